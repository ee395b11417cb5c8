"""The one form of every stored measurement: `benchmarks/results/*.jsonl`, one object a row."""

from __future__ import annotations

import datetime
import json
import platform
import statistics
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, field, fields
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from sailfish.bench import peers
from sailfish.version import __version__

_NAMED = ("torch", "triton", "numpy", "tokenizers")


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """One figure: what was measured, where, by which command, and what it is compared with."""

    suite: str
    row: str
    value: float
    """Median of the runs."""
    unit: str
    spread: float
    """Largest minus smallest run, in the same unit."""
    target: float | None = None
    peer: str | None = None
    peer_value: float | None = None
    ideal: float | None = None
    """What bytes and operations take at the calibrated rates, in the same unit."""
    implementation: str = ""
    launches: Mapping[str, float] = field(default_factory=dict)
    """Launches of each kernel: of one call, or of one step of an engine."""
    downgrades: Sequence[str] = ()
    """Where the engine fell back to less, in words."""
    kernel_us: Mapping[str, float] = field(default_factory=dict)
    """Of each kernel in a step, by a profiler's trace; kernels that begin early overlap."""
    device: str
    calibration: Mapping[str, float] = field(default_factory=dict)
    """What the machine itself gave in the same session, such as its read bandwidth."""
    versions: Mapping[str, str]
    command: str
    commit: str
    date: str


_NOTHING: tuple[object, ...] = (None, "", {}, (), [])
_OPTIONAL = {
    known.name
    for known in fields(Result)
    if known.default is not MISSING or known.default_factory is not MISSING
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Recorder:
    """Makes results that share their circumstances."""

    suite: str
    device: str
    command: str
    calibration: Mapping[str, float]

    def result(
        self,
        row: str,
        runs: Sequence[float],
        unit: str,
        *,
        target: float | None = None,
        peer: str | None = None,
        peer_value: float | None = None,
        ideal: float | None = None,
        implementation: str = "",
        launches: Mapping[str, float] | None = None,
        downgrades: Sequence[str] = (),
        kernel_us: Mapping[str, float] | None = None,
    ) -> Result:
        """Return the median of `runs` as a row of this suite.

        A target or peer that is not given is looked up by the row's name.
        """
        known = peers.peer(row)
        if known is not None:
            target = known.target if target is None else target
            if peer is None and (best := known.best()) is not None:
                peer, peer_value = best
        return Result(
            suite=self.suite,
            row=row,
            value=_rounded(statistics.median(runs)),
            unit=unit,
            spread=_rounded(max(runs) - min(runs)),
            target=target,
            peer=peer,
            peer_value=peer_value,
            ideal=None if ideal is None else _rounded(ideal),
            implementation=implementation,
            launches=launches or {},
            downgrades=tuple(downgrades),
            kernel_us=kernel_us or {},
            device=self.device,
            calibration=self.calibration,
            versions=_versions(),
            command=self.command,
            commit=_commit(),
            date=datetime.datetime.now(datetime.UTC).date().isoformat(),
        )


def command(words: Sequence[str]) -> str:
    """Return a command line as a row stores it: without `--out FILE`, other paths by their last part."""
    kept = [
        word
        for before, word in zip(("", *words), words, strict=False)
        if word != "--out" and before != "--out" and not word.startswith("--out=")
    ]
    return " ".join(Path(word).name if word.startswith(("/", "./", "../", "~")) else word for word in kept)


def latest(path: Path) -> list[Result]:
    """Read a file of rows and return the last of each name."""
    rows = (json.loads(line) for line in path.read_text(encoding="utf-8").splitlines())
    return list({(row["row"], row["device"]): Result(**row) for row in rows}.values())


def prune(path: Path) -> None:
    """Keep the last row of each name and device in a file of rows, in the order of their names' first."""
    text = "".join(_line(row) for row in latest(path))
    if text != path.read_text(encoding="utf-8"):
        path.write_text(text, encoding="utf-8")


def store(results: Sequence[Result], path: Path) -> None:
    """Append rows to a file of JSON lines, making its folder when it is not there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.writelines(map(_line, results))


def _line(result: Result) -> str:
    """Write a row without the fields that say nothing."""
    known = asdict(result).items()
    said = {name: value for name, value in known if not (name in _OPTIONAL and value in _NOTHING)}
    return json.dumps(said) + "\n"


@cache
def _versions() -> dict[str, str]:
    found = {"sailfish": __version__, "python": platform.python_version()}
    for name in _NAMED:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


@cache
def _commit() -> str:
    """Return the commit of the checkout this package lies in, "-dirty" if changed, or "" outside of one."""
    try:
        done = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--exclude=*"],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            timeout=10,
            check=False,
        )
    except OSError:
        return ""
    return done.stdout.strip()


def _rounded(value: float) -> float:
    """Keep five significant digits: more would claim a precision that no run has."""
    return float(f"{value:.5g}")
