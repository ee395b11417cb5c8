"""The budget of a step, the peers' table, and the rows that `--only` picks."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from sailfish.bench import peers
from sailfish.bench.budget import BATCHES, CASES, Rates, budget
from sailfish.bench.results import Recorder, command, latest, prune, store
from sailfish.bench.select import is_wanted

RATES = Rates(read_gb_per_s=4300.0, bf16_tflop_per_s=790.0, floor_us=1.5)
_RECORDER = Recorder(suite="kernels", device="a card", command="bench", calibration={})


@pytest.mark.parametrize(
    ("shape", "weights", "limit_tokens_per_s"),
    [
        ("llama-3.1-8b", "bfloat16", 284),
        ("llama-3.1-8b", "int4", 899),
        ("llama-2-7b", "bfloat16", 313),
        ("llama-2-7b", "int4", 1039),
    ],
)
def test_the_limit_at_batch_1_is_the_published_one(shape, weights, limit_tokens_per_s) -> None:  # type: ignore[no-untyped-def]
    """Weights and 1,024 tokens of KV read once at 4.3 TB/s."""
    found = budget(shape, weights, 1, context_tokens=1024)
    assert 1e6 / found.limit_us(RATES) == pytest.approx(limit_tokens_per_s, rel=0.01)


def test_weights_make_up_the_bytes_of_a_step() -> None:
    ops = {op.name: op for op in budget("llama-3.1-8b", "bfloat16", 1).ops}
    linears = ("qkv", "o", "gate_up", "down", "head")
    n_bytes = sum(ops[name].n_calls * ops[name].n_bytes for name in linears)
    assert n_bytes == pytest.approx(15.01e9, rel=0.001)


def test_products_of_8_bits_run_at_twice_the_rate() -> None:
    wide = {
        w: next(op for op in budget("llama-3.1-8b", w, 256).ops if op.name == "gate_up")
        for w in ("fp8", "int4")
    }
    assert wide["int4"].limit_us(RATES) == pytest.approx(2 * wide["fp8"].limit_us(RATES), rel=0.01)


def test_every_case_has_a_target_and_a_peer() -> None:
    for shape, weights in CASES:
        for batch in BATCHES:
            found = budget(shape, weights, batch)
            assert found.target_us is not None
            assert found.peer_us is not None
            assert found.limit_us(RATES) < found.step_us(RATES) < found.peer_us


def test_a_step_is_measured_once_every_op_that_repeats_is() -> None:
    found = budget("llama-3.1-8b", "int4", 1)
    measured = {op.row: 10.0 for op in found.ops if op.n_calls > 1}
    assert found.measured_us(measured) == pytest.approx((32 * 9 + 1) * 10.0)  # the last norm is measured too
    del measured["w4a16 qkv M=1"]
    assert found.measured_us(measured) is None


def test_the_peers_rows_are_named_once() -> None:
    data = json.loads((Path(peers.__file__).parent / "peers.json").read_text())
    names = [row["row"] for row in data["rows"]]
    assert len(names) == len(set(names)) > 150


def test_the_best_peer_is_the_fastest_or_the_largest() -> None:
    layer = peers.peer("w4a16 qkv M=1")
    decode = peers.peer("llama-3.1-8b int4: decode B=1")
    assert layer is not None and layer.best() == ("Marlin", 10.93)
    assert decode is not None and decode.best() == ("vLLM 0.26, Marlin", 304.1)


def test_a_target_scales_with_the_machine() -> None:
    row = peers.peer("llama-3.1-8b bfloat16: decode B=1")
    assert row is not None
    reads = peers.calibration()["read_gb_per_s"]
    assert row.is_met_by(240.0, {}) is True
    assert row.is_met_by(239.0, {}) is False
    assert row.is_met_by(216.0, {"read_gb_per_s": 0.9 * reads}) is True
    attention = peers.peer("decode attention 1 x 1024 bfloat16")
    assert attention is not None
    assert attention.is_met_by(9.7, {"read_gb_per_s": 0.9 * reads}) is True
    assert attention.is_met_by(9.7, {"read_gb_per_s": reads}) is False


def test_a_row_takes_target_and_peer_from_the_table() -> None:
    row = _RECORDER.result("llama-3.1-8b bfloat16: ttft 2048", [50.0, 49.0, 51.0], "ms")
    assert (row.value, row.spread, row.target, row.peer, row.peer_value) == (50.0, 2.0, 48, "vLLM 0.26", 52.9)


def test_the_latest_row_of_a_name_counts(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    store([_RECORDER.result("a", [1.0], "us"), _RECORDER.result("b", [2.0], "us")], path)
    store([_RECORDER.result("a", [3.0], "us")], path)
    assert {row.row: row.value for row in latest(path)} == {"a": 3.0, "b": 2.0}


def test_what_is_superseded_is_dropped_and_the_rest_stays_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    for value in (1.0, 2.0, 0.0):
        rows = [_RECORDER.result(row, [value], "us", launches={"kernel": 2}) for row in ("a", "b")]
        store(rows, path)
    prune(path)
    assert len(path.read_text().splitlines()) == 2
    assert latest(path) == rows
    before = path.stat().st_mtime_ns
    prune(path)
    assert path.stat().st_mtime_ns == before


def test_a_stored_command_names_no_folder_of_the_machine() -> None:
    words = [
        "sailfish",
        "bench",
        "--trace",
        "/data/azure.csv.xz",
        "--out",
        "/tmp/rows.jsonl",
        "--repeats",
        "3",
    ]
    assert command(words) == "sailfish bench --trace azure.csv.xz --repeats 3"
    assert command(["python", "benchmarks/compare.py", "--out=x"]) == "python benchmarks/compare.py"


def test_only_picks_rows_that_contain_a_pattern() -> None:
    assert is_wanted("w4a16 qkv M=1", [])
    assert is_wanted("w4a16 qkv M=1", ["decode", "w4a16"])
    assert is_wanted("w4a16 qkv M=16", ["qkv*M=16"])
    assert not is_wanted("w4a16 qkv M=1", ["decode"])
