"""Start the engine process, watch it, start it again when it dies, stop it."""

from __future__ import annotations

import contextlib
import logging
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec

from sailfish.base.config import EngineConfig
from sailfish.base.errors import ConfigError, EngineError, SailfishError, error_from_code
from sailfish.base.sources import environment

log = logging.getLogger(__name__)

_ENVIRONMENT = {"GOMP_SPINCOUNT": "500"}
"""OpenMP threads park after about 50 us. By default they spin for milliseconds, so that whenever another
process has a core (our own API process, say) each parallel region waits 16 ms instead of 0.3 ms
(linear of 16 x 256 by 256 x 1,024, two threads on two busy cores)."""
_MAX_DEATHS = 3
_DEATH_WINDOW_S = 60.0
_STOP_S = 10.0


class Progress(msgspec.Struct, frozen=True, tag="progress"):
    """Worker's word on its way to READY."""

    stage: str
    detail: str = ""
    elapsed_s: float = 0.0


class Ready(msgspec.Struct, frozen=True, tag="ready"):
    """Worker's word: clients may connect."""

    started_s: float


class Failed(msgspec.Struct, frozen=True, tag="failed"):
    """Worker's word: it cannot start, and why."""

    code: str
    message: str
    hint: str | None = None


_decoder = msgspec.json.Decoder(Progress | Ready | Failed)


class EngineProcess:
    """One engine process and its private socket.

    The process lives no longer than this one: it ends when its standard input closes.
    """

    def __init__(
        self,
        engine_dir: Path,
        config: EngineConfig,
        *,
        name: str | None = None,
        restart: bool = False,
        trace_to: Path | None = None,
        drain_s: float = 30.0,
        log_level: str = "warning",
        log_json: bool = False,
        on_progress: Callable[[Progress], None] | None = None,
        on_give_up: Callable[[], None] | None = None,
    ) -> None:
        """Name what to run; with `restart`, `on_give_up` is called when starting it again is hopeless."""
        if not isinstance(config, EngineConfig):
            raise ConfigError(f"an engine's configuration is an EngineConfig, not {type(config).__name__}")
        try:
            config = msgspec.convert(msgspec.to_builtins(config), EngineConfig)
        except (msgspec.ValidationError, TypeError) as error:
            raise ConfigError(f"the engine's configuration is wrong: {error}") from None
        self._dir = Path(tempfile.mkdtemp(prefix="sailfish-"))  # mode 0700
        self.socket_path = self._dir / "engine.sock"
        self._command = [
            *(sys.executable, "-m", "sailfish.engine.worker"),
            *("--engine", str(engine_dir)),
            *("--socket", str(self.socket_path)),
            *("--config", msgspec.json.encode(config).decode()),
            *("--drain-s", str(drain_s)),
            *("--log-level", log_level),
        ]
        if name is not None:
            self._command += ["--name", name]
        if log_json:
            self._command += ["--log-json"]
        if trace_to is not None:
            self._command += ["--trace-to", str(trace_to)]
        self._restart = restart
        self._on_progress = on_progress or (lambda _: None)
        self._on_give_up = on_give_up or (lambda: None)
        self._stopping = False
        self._lock = threading.Lock()
        """Held to start a process or to forbid it."""
        self._deaths: list[float] = []
        self._process: subprocess.Popen[bytes] | None = None
        self._watcher: threading.Thread | None = None

    @property
    def pid(self) -> int | None:
        """Process id, or None when no process runs."""
        return None if self._process is None or self._process.poll() is not None else self._process.pid

    def start(self) -> None:
        """Start the process and return once it is READY; raises what it says is wrong."""
        try:
            self._spawn()
        except BaseException:
            self.stop()
            raise
        if self._restart:
            self._watcher = threading.Thread(target=self._watch, name="engine-watch", daemon=True)
            self._watcher.start()

    def stop(self) -> None:
        """End the process at once, and remove its socket. May be called twice."""
        with self._lock:
            self._stopping = True
            process = self._process
        if process is not None and process.poll() is None:
            assert process.stdin is not None
            with contextlib.suppress(OSError):
                process.stdin.close()
            wait_or_kill(process, _STOP_S)
        if self._watcher is not None:
            self._watcher.join()
        self._close_pipes()
        shutil.rmtree(self._dir, ignore_errors=True)

    def _spawn(self) -> None:
        """Start a process and wait until it is READY; does nothing once `stop` was called."""
        with self._lock:
            if self._stopping:
                return
            self._close_pipes()
            self._process = subprocess.Popen(
                self._command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                start_new_session=True,
                env={**_ENVIRONMENT, **environment()},
            )
        assert self._process.stdout is not None
        for line in self._process.stdout:
            try:
                message = _decoder.decode(line)
            except msgspec.DecodeError:
                log.warning("engine process: %s", line.decode(errors="replace").rstrip())
                continue
            match message:
                case Progress():
                    self._on_progress(message)
                case Ready():
                    return
                case Failed(code=code, message=text, hint=hint):
                    self._process.wait()
                    error: SailfishError = error_from_code(code, text)
                    error.hint = hint
                    raise error
        status = self._process.wait()
        raise EngineError(
            f"the engine process ended with status {status} before it was ready",
            hint="its standard error says more; run `sailfish doctor`",
        )

    def _watch(self) -> None:
        self._restart_while_it_helps()
        if not self._stopping:
            self._on_give_up()

    def _restart_while_it_helps(self) -> None:
        while True:
            assert self._process is not None
            status = self._process.wait()
            if self._stopping:
                return
            now_s = time.monotonic()
            self._deaths = [t for t in self._deaths if now_s - t < _DEATH_WINDOW_S] + [now_s]
            if len(self._deaths) > _MAX_DEATHS:
                log.error("the engine process died %d times in a minute; giving up", len(self._deaths))
                return
            log.error("the engine process ended with status %s; starting another", status)
            try:
                self._spawn()
            except (SailfishError, OSError) as error:  # it has ended, which the next round counts
                log.error("the engine process did not start again: %s", error)

    def _close_pipes(self) -> None:
        if self._process is not None:
            for pipe in (self._process.stdin, self._process.stdout):
                if pipe is not None:
                    with contextlib.suppress(OSError):
                        pipe.close()


def wait_or_kill(process: subprocess.Popen[Any], within_s: float) -> int:
    """Return a process's exit status once it ends, by itself or, when the time is over, killed."""
    try:
        return process.wait(within_s)
    except subprocess.TimeoutExpired:
        process.kill()
        return process.wait()
