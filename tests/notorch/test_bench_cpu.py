"""The CPU's columns: runs in turns, ratios, what others' programs say, and a shape as GGUF."""

from __future__ import annotations

import asyncio
import struct
import sys
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sailfish.base.config import EngineConfig
from sailfish.base.errors import ConfigError, EngineError
from sailfish.bench import cpu, cpu_facts, load, shapes
from sailfish.bench.cpu import Turns
from sailfish.bench.cpu_gguf import gguf_name, write_gguf
from sailfish.bench.cpu_llama import LlamaCpp
from sailfish.bench.engine import Case, Measured
from sailfish.bench.results import Recorder
from sailfish.bench.streams import Carried, Server
from sailfish.checkpoint.safetensors_reader import Checkpoint
from sailfish.cli.main import main
from sailfish.hardware.profile import HardwareProfile

TINY = {
    **shapes.SHAPES["llama-3.2-1b"],
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 96,
    "vocab_size": 40,
}


class _Rival:
    """Notes when it was asked."""

    def __init__(self, name: str, log: list[str]) -> None:
        self.name, self._log = name, log

    def rate(self, case: Case) -> float:
        self._log.append(self.name)
        return float(len(self._log))

    @contextmanager
    def serve(self, n_sequences: int) -> Iterator[Server]:
        yield Server(url=self.name)


class _Engine:
    """Stands in for an engine that is up."""

    @classmethod
    async def start(cls, engine_dir: Path, *, config: EngineConfig) -> _Engine:
        return cls()

    async def __aenter__(self) -> _Engine:
        return self

    async def __aexit__(self, *_: object) -> None:
        return None


def _measured(rivals: Sequence[_Rival], row: str, repeats: int) -> list[Turns]:
    async def run() -> list[Turns]:
        measuring = cpu.measure(Path("e"), EngineConfig(), [], rivals, rows=[row], repeats=repeats)
        return [turns async for turns in measuring]

    return asyncio.run(run())


def test_each_run_of_ours_follows_one_of_every_rival(monkeypatch: pytest.MonkeyPatch) -> None:
    log: list[str] = []

    async def ours(engine: object, cases: list[Case], *, repeats: int, seed: int) -> AsyncIterator[Measured]:
        log.append(f"ours {seed}")
        yield Measured(case=cases[0], values=(10.0 * len(log),))

    monkeypatch.setattr(cpu, "AsyncEngine", _Engine)
    monkeypatch.setattr(cpu.steady, "measure", ours)
    [turns] = _measured([_Rival("a", log), _Rival("b", log)], cpu.ONE.name, 2)
    assert log == ["a", "b", "ours 0", "a", "b", "ours 1"]
    assert turns == Turns(
        row=cpu.ONE.name, unit="tokens/s", ours=[30.0, 60.0], theirs={"a": [1.0, 4.0], "b": [2.0, 5.0]}
    )
    assert turns.best() == "b"
    assert turns.ratios("b") == [15.0, 12.0]


def test_every_server_is_loaded_once_a_turn_and_its_figures_stay_its_own(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    log = []

    def carried(server: Server, engine_dir: Path, n_streams: int, n_out: int, seed: int) -> Carried:
        log.append((server.url, seed))
        rate = 100.0 if server.url == "ours" else 50.0
        return Carried(
            tokens_per_s=rate + seed,
            tokens_per_event=1.0,
            first_ms=(rate,),
            gap_ms=(rate,),
            api_us_per_token=None,
        )

    @contextmanager
    def served(*_: object) -> Iterator[Server]:
        yield Server(url="ours")

    monkeypatch.setattr(cpu, "carry", carried)
    monkeypatch.setattr(cpu, "real_server", served)
    found = {turns.row: turns for turns in _measured([_Rival("a", [])], cpu.HTTP, 2)}
    assert log[2:] == [("a", 0), ("ours", 0), ("a", 1), ("ours", 1)]
    assert found["http x 16: output"].theirs == {"a": [50.0, 51.0]}
    assert found["http x 16: output"].ours == [100.0, 101.0]
    gap = found["http x 16: gap p99"]
    assert (gap.best(), gap.ratios("a")) == ("a", [0.5, 0.5])


def test_a_figure_becomes_rows_of_ours_of_theirs_and_of_the_ratio_with_its_target() -> None:
    recorder = Recorder(suite="cpu", device="d", command="c", calibration={})
    column = "int4, int8 head and embedding"
    turns = Turns(
        row=cpu.PREFILL.name, unit="tokens/s", ours=[40.0, 50.0, 60.0], theirs={"x": [10.0, 20.0, 40.0]}
    )
    ours, theirs, ratio = cpu.results(recorder, "m", column, turns, "linear by k")
    assert (ours.row, ours.value, ours.peer, ours.peer_value) == (f"m {column}: prefill 1 x 512", 50, "x", 20)
    assert ours.implementation == "linear by k"
    assert (theirs.row, theirs.value) == ("m x: prefill 1 x 512", 20)
    assert (ratio.row, ratio.value, ratio.unit, ratio.target) == (f"{ours.row}, over x", 2.5, "x", 1.8)
    assert [cpu.is_met(row) for row in (ours, theirs, ratio)] == [None, None, True]
    [alone] = cpu.results(recorder, "m", "bfloat16", Turns(row="start", unit="s", ours=[2.5]), "")
    assert (alone.row, alone.peer, cpu.is_met(alone)) == ("m bfloat16: start", None, False)


def test_a_head_that_ends_in_a_zero_is_not_the_end_of_an_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    events = b'data: {"text":"a"}', b'data: {"usage":{"completion_tokens":1}}', b"data: [DONE]"
    body = b"".join(b"%x\r\n%s\r\n" % (len(event), event) for event in events)
    parts = [b"HTTP/1.1 200 OK\r\nKeep-Alive: timeout=5, max=100\r\n\r\n", body, b"0\r\n\r\n", b""]

    class _Connection:
        async def read(self, n_bytes: int) -> bytes:
            return parts.pop(0)

        def write(self, data: bytes) -> None: ...

        def close(self) -> None: ...

    async def connected(*_: object, **__: object) -> tuple[_Connection, _Connection]:
        return _Connection(), _Connection()

    monkeypatch.setattr(asyncio, "open_connection", connected)
    task = load.Task(url="http://h:1", model="m", streams=1, n_out=1, vocab_size=50, seed=0)
    report = asyncio.run(load.load(task))
    assert (report.failures, report.n_tokens, report.n_events) == ([], 1, 3)


def _program(folder: Path, name: str, body: str) -> LlamaCpp:
    """Put a Python script where a program of llama.cpp would lie."""
    path = folder / "bin" / name
    path.parent.mkdir()
    path.write_text(f"#!{sys.executable} -S\nimport sys\nargs = sys.argv[1:]\n{body}\n", encoding="utf-8")
    path.chmod(0o755)
    (folder / "Q4_0.gguf").touch()
    return LlamaCpp(folder=folder, format="Q4_0", n_threads=2)


@pytest.mark.parametrize(
    ("case", "program", "said", "flags"),
    [
        (cpu.ONE, "llama-bench", '[{"avg_ts": 51.5}]', "-p 0 -n 64 -d 128"),
        (cpu.PREFILL, "llama-bench", '[{"avg_ts": 51.5}]', "-p 512 -n 0 -d 0"),
        (cpu.MANY, "llama-batched-bench", '{"speed_tg": 51.5}', "-npp 128 -ntg 64 -npl 16"),
    ],
)
def test_a_case_is_asked_of_the_program_that_measures_it(
    tmp_path: Path, case: Case, program: str, said: str, flags: str
) -> None:
    body = f"assert {flags!r} in ' '.join(args) and '-t 2' in ' '.join(args), args\nprint({said!r})"
    assert _program(tmp_path, program, body).rate(case) == 51.5


def test_a_program_that_fails_or_is_not_there_says_so(tmp_path: Path) -> None:
    llama = _program(tmp_path, "llama-bench", "sys.exit('no such format')")
    with pytest.raises(EngineError, match="status 1: no such format"):
        llama.rate(cpu.ONE)
    with pytest.raises(ConfigError, match="there is no .*llama-batched-bench"):
        llama.rate(cpu.MANY)
    with pytest.raises(ConfigError, match=r"there is no .*llama-server"), llama.serve(1):
        pass


def test_a_server_that_ends_before_it_serves_is_an_error_that_names_its_log(tmp_path: Path) -> None:
    llama = _program(tmp_path, "llama-server", "sys.exit('no memory')")
    with pytest.raises(EngineError) as caught, llama.serve(1):
        pass
    assert caught.value.hint == f"see {tmp_path / 'server.log'}"
    assert (tmp_path / "server.log").read_text() == "no memory\n"


def _read_gguf(data: bytes) -> tuple[dict[str, Any], dict[str, tuple[list[int], int, int]]]:
    """Read metadata and (dims, type, offset) of tensors, straight from the format's specification."""
    at = 0

    def take(form: str) -> Any:
        nonlocal at
        [value] = struct.unpack_from(f"<{form}", data, at)
        at += struct.calcsize(form)
        return value

    def text() -> str:
        nonlocal at
        n = take("Q")
        at += n
        return data[at - n : at].decode()

    def value(kind: int) -> Any:
        if kind == 9:
            kind = take("I")
            return [value(kind) for _ in range(take("Q"))]
        return text() if kind == 8 else take({4: "I", 5: "i", 6: "f"}[kind])

    assert take("4s") == b"GGUF"
    assert take("I") == 3
    n_tensors, n_values = take("Q"), take("Q")
    values = {text(): value(take("I")) for _ in range(n_values)}
    tensors = {
        text(): ([take("Q") for _ in range(take("I"))], take("I"), take("Q")) for _ in range(n_tensors)
    }
    start = at + -at % 32
    return values, {name: (dims, kind, start + offset) for name, (dims, kind, offset) in tensors.items()}


def test_a_checkpoint_as_gguf_has_its_sizes_and_its_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(shapes.SHAPES, "tiny", TINY)
    monkeypatch.setattr(shapes, "_POOL_ELEMENTS", 1 << 13)
    source = shapes.write_checkpoint("tiny", tmp_path / "source")
    write_gguf(source, tmp_path / "tiny.gguf")
    data = (tmp_path / "tiny.gguf").read_bytes()
    values, tensors = _read_gguf(data)
    assert values["llama.attention.head_count_kv"] == 2
    assert values["llama.rope.freq_base"] == 500_000.0
    assert values["tokenizer.ggml.tokens"] == [f"t{i}" for i in range(40)]
    checkpoint = Checkpoint.open(source)
    assert len(tensors) == len(checkpoint.tensors) == 2 + 2 * 9
    for name, ref in checkpoint.tensors.items():
        dims, kind, at = tensors[gguf_name(name)]
        assert (dims, at % 32) == ([*reversed(ref.shape)], 0)
        if len(ref.shape) == 1:
            assert (kind, np.frombuffer(data, np.float32, dims[0], at).tolist()) == (0, [1.0] * dims[0])
        else:
            assert (kind, data[at : at + ref.n_bytes]) == (30, bytes(checkpoint.bytes(name)))


def test_the_facts_name_caches_and_threads(tmp_path: Path) -> None:
    for i, (level, kind, size) in enumerate(
        [(1, "Data", "32K"), (1, "Instruction", "64K"), (3, "Unified", "32M")]
    ):
        index = tmp_path / "sys/devices/system/cpu/cpu0/cache" / f"index{i}"
        index.mkdir(parents=True)
        for name, text in (("level", str(level)), ("type", kind), ("size", size)):
            (index / name).write_text(f"{text}\n")
    hardware = HardwareProfile(
        target="cpu",
        device="cpu",
        name="A CPU",
        memory_bytes=8 << 30,
        free_bytes=4 << 30,
        n_cores=4,
        runtime_bytes=0,
    )
    facts = cpu_facts.facts(hardware, {"OMP_NUM_THREADS": "3"}, tmp_path)
    assert facts["caches"] == "L1 32.0 KiB, L3 32M"
    assert facts["threads"].endswith("3 (OMP_NUM_THREADS) of torch")
    assert cpu_facts.facts(hardware, {}, tmp_path / "nothing")["caches"] == "unknown"


@pytest.mark.parametrize(
    ("words", "said"),
    [(["--only", "no such row"], "--only picks no row"), (["books-4m", "--peers", "x"], "not MODEL's")],
)
def test_what_would_measure_nothing_or_other_models_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], words: list[str], said: str
) -> None:
    monkeypatch.setattr(sys, "argv", ["sailfish", "bench", "cpu", *words])
    with pytest.raises(SystemExit):
        main()
    assert said in capsys.readouterr().err
