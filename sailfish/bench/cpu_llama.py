"""llama.cpp as it is measured beside us: its own benchmarks and its own server, as they were built here."""

from __future__ import annotations

import contextlib
import json
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from sailfish.base.errors import ConfigError, EngineError
from sailfish.bench.engine import Case
from sailfish.bench.streams import Server
from sailfish.engine.launch import wait_or_kill

_READY_S, _POLL_S, _STOP_S = 120.0, 0.1, 20.0
_CONTEXT_TOKENS = 1024
"""Of each sequence of its server."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LlamaCpp:
    """One format of the shape in a folder that `benchmarks/cpu_peers.py` made."""

    folder: Path
    format: str
    """As llama.cpp calls it: "Q4_0", "Q4_K_M", "Q8_0" or "BF16"."""
    n_threads: int

    @property
    def name(self) -> str:
        """What its rows call it."""
        return f"llama.cpp {self.format}"

    def rate(self, case: Case) -> float:
        """Return tokens per second of one run, by llama-bench, or llama-batched-bench for many sequences.

        Both measure bare steps: nothing is sampled and no text made.
        """
        if case.batch > 1:
            n_context = case.batch * (case.n_in + case.n_out)
            lengths = ("-npp", case.n_in, "-ntg", case.n_out, "-npl", case.batch, "-c", n_context)
            said = self._run("llama-batched-bench", *lengths, "--output-format", "jsonl")
            return float(json.loads(said.strip().splitlines()[-1])["speed_tg"])
        n_in, n_out, n_before = (case.n_in, 0, 0) if case.kind == "prefill" else (0, case.n_out, case.n_in)
        said = self._run("llama-bench", "-p", n_in, "-n", n_out, "-d", n_before, "-r", 1, "-o", "json")
        return float(json.loads(said)[0]["avg_ts"])

    @contextlib.contextmanager
    def serve(self, n_sequences: int) -> Iterator[Server]:
        """Run llama-server on a free port, with room for so many sequences at once."""
        with socket.create_server(("127.0.0.1", 0)) as found:
            port = found.getsockname()[1]
        n_context = n_sequences * _CONTEXT_TOKENS
        flags = ("--host", "127.0.0.1", "--port", port, "-np", n_sequences, "-c", n_context)
        with (self.folder / "server.log").open("w") as log:
            process = subprocess.Popen(
                self._command("llama-server", *flags), stdout=log, stderr=subprocess.STDOUT
            )
            try:
                url = f"http://127.0.0.1:{port}"
                self._wait(process, url)
                yield Server(url=url)
            finally:
                process.terminate()
                wait_or_kill(process, _STOP_S)

    def _wait(self, process: subprocess.Popen[bytes], url: str) -> None:
        """Return when the server's model is loaded; raises EngineError where it never is."""
        until_s = time.monotonic() + _READY_S
        while process.poll() is None and time.monotonic() < until_s:
            try:
                with urllib.request.urlopen(f"{url}/health"):
                    return
            except urllib.error.URLError:  # not there yet, or 503: still loading
                time.sleep(_POLL_S)
        raise EngineError("llama-server did not begin to serve", hint=f"see {self.folder / 'server.log'}")

    def _run(self, program: str, *flags: str | int) -> str:
        """Return what a program said; raises EngineError with its last line when it failed."""
        done = subprocess.run(self._command(program, *flags), capture_output=True, text=True)
        if done.returncode:
            lines = done.stderr.strip().splitlines()
            raise EngineError(f"{program} ended with status {done.returncode}: {lines[-1] if lines else ''}")
        return done.stdout

    def _command(self, program: str, *flags: str | int) -> list[str]:
        binary, model = self.folder / "bin" / program, self.folder / f"{self.format}.gguf"
        for path in (binary, model):
            if not path.exists():
                raise ConfigError(f"there is no {path}", hint=f"benchmarks/cpu_peers.py {self.folder}")
        return [str(binary), "-m", str(model), "-t", str(self.n_threads), *map(str, flags)]
