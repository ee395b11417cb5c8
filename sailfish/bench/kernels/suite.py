"""Runs the kernel rows that were asked for, and sums them up as the targets are stated."""

from __future__ import annotations

import logging
import math
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence

from sailfish.base.errors import EngineError
from sailfish.bench import peers
from sailfish.bench.kernels.attention import attention_rows
from sailfish.bench.kernels.elementwise import elementwise_rows
from sailfish.bench.kernels.linear import LAYERS, ROWS, linear_rows
from sailfish.bench.kernels.row import Measured, Row, measure
from sailfish.bench.kernels.sampling import sampling_rows
from sailfish.bench.results import Recorder, Result
from sailfish.bench.select import is_wanted

log = logging.getLogger(__name__)

_LOST = "CUDA error"
"""In what torch says once a kernel has failed; nothing runs in this process after it."""
_BANDS = {
    "M=1..8": range(1, 9),
    "M=16..64": range(16, 65),
    "M=128..256": range(128, 257),
    "M>=1024": range(1024, max(ROWS) + 1),
}
"""Rows of activations over which a geometric mean is taken."""


def all_rows(target: str) -> Iterator[Row]:
    """Yield every row there is for a target such as "sm_90"."""
    yield from linear_rows(target)
    yield from attention_rows(target)
    yield from elementwise_rows(target)
    yield from sampling_rows(target)


def run(
    recorder: Recorder,
    target: str,
    *,
    only: Sequence[str],
    alternatives: bool,
    repeats: int,
    say: Callable[[Result], None],
) -> list[Result]:
    """Measure the rows whose names match `only`, tell each as it comes, and add what follows from them.

    `alternatives`: also what an engine on this device does not choose.
    """
    results = []
    for row in all_rows(target):
        if not is_wanted(row.name, only) or not (row.is_chosen or alternatives):
            continue
        try:
            measured = measure(row, repeats)
        except (EngineError, RuntimeError) as error:
            said = str(error).partition("\n")[0]
            if _LOST in said:
                raise EngineError(
                    f"{row.name}, {row.implementation}: {said}; the GPU takes no more work"
                ) from error
            log.error("%s, %s: %s", row.name, row.implementation, said)  # the others can still be measured
            continue
        results.append(_result(measured, recorder))
        say(results[-1])
    for summary in summaries(results, recorder):
        results.append(summary)
        say(summary)
    return results


def summaries(results: Sequence[Result], recorder: Recorder) -> Iterator[Result]:
    """Yield geometric means over layers and rows: against the best peer, and against dequantising first."""
    found = {result.row: result.value for result in results}
    for band, ms in _BANDS.items():
        cells = [(layer, m) for layer in LAYERS for m in ROWS if m in ms]
        ours = [found.get(f"w4a16 {layer} M={m}") for layer, m in cells]
        cublas = [found.get(f"cublas bf16 {layer} M={m}") for layer, m in cells]
        if None in ours or None in cublas:
            continue
        best = cublas if band == "M>=1024" else [_best(cell, found) for cell in cells]
        who = "cuBLAS bf16" if band == "M>=1024" else "the best peer"
        ratio = _geomean([a / b for a, b in zip(best, ours, strict=True) if a and b])
        yield recorder.result(f"w4a16 {band}", [ratio], f"times {who}")
        if band == "M=1..8":
            least = [
                _dequantised_us(layer, us, recorder.calibration)
                for (layer, _), us in zip(cells, cublas, strict=True)
            ]
            below = 1 - 1 / _geomean([a / b for a, b in zip(least, ours, strict=True) if b])
            name = f"w4a16 {band}: below dequantising once and cuBLAS"
            yield recorder.result(name, [100 * below], "%")


def _best(cell: tuple[str, int], found: Mapping[str, float]) -> float:
    """Return the fastest of the peers' stored figures and of cuBLAS here, in microseconds."""
    layer, m = cell
    known = peers.peer(f"w4a16 {layer} M={m}")
    stored = list(known.peers.values()) if known is not None else []
    return min([*stored, found[f"cublas bf16 {layer} M={m}"]])


def _dequantised_us(layer: str, cublas_us: float | None, calibration: Mapping[str, float]) -> float:
    """Return what a layer takes at the least when its weight is first written out in 16 bits."""
    n_out, n_in = LAYERS[layer]
    n_bytes = n_out * n_in * (0.5 + 2 / 128 + 2)
    return (cublas_us or 0.0) + n_bytes / calibration["read_gb_per_s"] / 1e3


def _result(measured: Measured, recorder: Recorder) -> Result:
    return recorder.result(
        measured.row.name,
        measured.runs_us,
        "us",
        ideal=measured.row.ideal_us(recorder.calibration),
        implementation=measured.row.implementation,
        launches=measured.launches,
    )


def _geomean(values: Sequence[float]) -> float:
    return math.exp(statistics.fmean(map(math.log, values)))
