"""The kernel measurements: what is summed up of them, and that each names kernels that exist."""

from __future__ import annotations

import pytest

from sailfish.bench import peers
from sailfish.bench.kernels.linear import LAYERS, ROWS
from sailfish.bench.kernels.row import Row
from sailfish.bench.kernels.suite import all_rows, summaries
from sailfish.bench.named import chosen_for, has_kernels, is_of, unlaunched
from sailfish.bench.results import Recorder, Result
from sailfish.kernels.contract import Choice
from sailfish.kernels.table import PREFERRED

_RECORDER = Recorder(suite="kernels", device="a card", command="bench", calibration={"read_gb_per_s": 4000.0})


def _rows(ours_us: float, cublas_us: float) -> list[Result]:
    cells = [(layer, m) for layer in LAYERS for m in ROWS]
    rows = [_RECORDER.result(f"w4a16 {layer} M={m}", [ours_us], "us") for layer, m in cells]
    return rows + [_RECORDER.result(f"cublas bf16 {layer} M={m}", [cublas_us], "us") for layer, m in cells]


def test_a_ratio_is_against_the_best_peer_of_each_row() -> None:
    found = {row.row: row for row in summaries(_rows(2.0, 8.0), _RECORDER)}
    assert found["w4a16 M=1..8"].value == pytest.approx(8.0 / 2.0, rel=1e-3)  # faster than any stored peer
    assert found["w4a16 M>=1024"].value == pytest.approx(8.0 / 2.0)
    slow = {row.row: row for row in summaries(_rows(2.0, 1e6), _RECORDER)}
    first = peers.peer("w4a16 qkv M=1")
    assert first is not None
    assert 4.0 < slow["w4a16 M=1..8"].value < 20.0  # Marlin's 10 to 32 us over 2 us
    assert found["w4a16 M=1..8"].target == 1.6


def test_nothing_is_summed_up_of_a_part_of_the_rows() -> None:
    rows = [row for row in _rows(2.0, 8.0) if row.row != "w4a16 o M=2"]
    assert "w4a16 M=1..8" not in {row.row for row in summaries(rows, _RECORDER)}


def test_dequantising_first_costs_at_least_the_bytes_it_moves() -> None:
    found = {row.row: row for row in summaries(_rows(2.0, 8.0), _RECORDER)}
    below = found["w4a16 M=1..8: below dequantising once and cuBLAS"]
    assert 80.0 < below.value < 100.0
    assert below.target == 40.0


def test_rows_are_named_once_and_cover_every_peers_kernel_row() -> None:
    names = [row.name for row in all_rows("sm_90")]
    assert len(names) == len(set(names))
    wanted = {
        "w4a16 qkv M=1",
        "bf16 head M=1",
        "w8a8 fp8 gate_up M=256",
        "sample greedy B=1",
        "decode attention 64 x 8192 fp8",
        "prefill attention 16 x 1024 bfloat16",
    }
    assert wanted | {"cublas bf16 down M=4096"} <= set(names)


def test_an_ideal_is_the_slower_of_bytes_and_operations() -> None:
    row = Row(name="x", implementation="y", calls=list, n_bytes=4_000_000, n_flops=8e9)
    machine = {"read_gb_per_s": 4000.0, "bf16_8192_tflop_per_s": 800.0}
    assert row.ideal_us(machine) == pytest.approx(10.0)
    assert row.ideal_us({**machine, "bf16_8192_tflop_per_s": 1e9}) == pytest.approx(1.0)
    assert row.ideal_us({}) is None


def test_a_launched_kernel_is_found_in_the_sources_of_its_implementation() -> None:
    skins = "sailfish.kernels.cuda."
    assert is_of("stream_int4", f"{skins}stream:linear_int4")
    assert is_of("decode_attention", f"{skins}attention:attention")  # which calls another skin
    assert is_of("rope_write_1", f"{skins}elementwise:rope_write")
    assert not is_of("nvjet_sm90_tst_64x8", f"{skins}stream:linear_int4")
    assert not is_of("stream_int4", f"{skins}wide:linear_int4")


def test_every_implementation_of_ours_has_sources() -> None:
    entries = {impl.entry for impls in PREFERRED.values() for impl in impls}
    ours = {entry for entry in entries if entry.startswith("sailfish.kernels.cuda.")}
    torchs = {"sailfish.kernels.cuda.linear8:scaled_mm_linear", "sailfish.kernels.cuda.linear8:int_mm_linear"}
    assert all(has_kernels(entry) for entry in ours - torchs)
    assert not any(has_kernels(entry) for entry in entries - ours)


def test_a_choice_counts_for_its_rows_only_and_is_missed_when_not_launched() -> None:
    def choice(implementation: str, max_rows: int | None) -> Choice:
        return Choice(
            op="rope_write",
            implementation=implementation,
            why="",
            declined=(),
            max_rows=max_rows,
        )

    few, many = choice("cuda_rope_write", 16), choice("reference", None)
    assert chosen_for([few, many], 16) == [few]
    assert chosen_for([few, many], 17) == [many]
    assert unlaunched([few], {"rope_write": 32}) == []
    assert unlaunched([few], {"gemm": 32}) == ["rope_write by cuda_rope_write"]
    assert unlaunched([many], {}) == []


def test_an_activation_of_its_own_is_not_missed_where_products_do_it() -> None:
    def choice(op: str, implementation: str, max_rows: int | None, activation: str = "") -> Choice:
        return Choice(
            op=op,
            implementation=implementation,
            why="",
            declined=(),
            n_out=64 if max_rows or activation else 0,
            max_rows=max_rows,
            activation=activation,
        )

    alone = choice("act_mul", "cuda_act_mul", None)
    fused = choice("norm_linear_int4", "cuda_stream_int4_gated", 16, "silu")
    apart = choice("norm_linear_int4", "one_by_one", None, "silu")
    assert chosen_for([alone, fused, apart], 16) == [fused]
    assert chosen_for([alone, fused, apart], 17) == [alone, apart]
    assert unlaunched([fused, apart], {"stream_int4": 32}) == []
    assert unlaunched([fused], {"stream_rows": 32}) == ["norm_linear_int4 by cuda_stream_int4_gated"]


def test_a_product_is_done_by_a_kernel_that_multiplies_its_format() -> None:
    def missing(op: str, implementation: str, *launched: str) -> bool:
        choice = Choice(op=op, implementation=implementation, why="", declined=())
        return bool(unlaunched([choice], dict.fromkeys(launched, 1)))

    assert not missing("linear_fp8", "cuda_stream_fp8", "stream_rows")
    assert missing("linear_fp8", "cuda_stream_fp8", "quantise_1", "stream_int4", "wide_linear_8")
    assert missing("linear_fp8", "cuda_wide_fp8", "quantise_1", "stream_rows")
    assert missing("linear_int4", "cuda_stream_int4", "stream_rows")
    assert not missing("norm_linear_int4", "cuda_wide_int4_gated", "wide_linear_int4")
