"""What the machine itself gives right now: read bandwidth and a large matrix product."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence

_READ_BYTES = {"cpu": 1 << 28, "cuda": 1 << 32}
_SQUARE = {"cpu": 1024, "cuda": 8192}
_RUNS = 7


def calibrate(device: str) -> dict[str, float]:
    """Return read bandwidth in GB/s (a sum over a large tensor) and bfloat16 TFLOP/s of a square product.

    Random data, medians; on "cuda" inside a graph, where a card runs as warm as it does in an engine.
    """
    import torch

    from sailfish.hardware.memory import release_cuda
    from sailfish.hardware.replay import replayed_us

    n_bytes, side = _READ_BYTES[device], _SQUARE[device]
    generator = torch.Generator(device).manual_seed(0)
    words = torch.randint(0, 1 << 30, (n_bytes // 4,), dtype=torch.int32, device=device, generator=generator)
    floats = words.view(torch.float32)
    a, b = torch.randn(2, side, side, device=device, generator=generator).to(torch.bfloat16)
    timed = replayed_us if device == "cuda" else _called_us
    read_us = statistics.median(timed([floats.sum], runs=_RUNS))
    product_us = statistics.median(timed([lambda: a @ b], runs=_RUNS))
    if device == "cuda":
        del words, floats, a, b
        release_cuda()  # the engine that is measured next shares the device
    return {
        "read_gb_per_s": round(n_bytes / read_us / 1e3, 1),
        f"bf16_{side}_tflop_per_s": round(2 * side**3 / product_us / 1e6, 2),
    }


def _called_us(calls: Sequence[Callable[[], object]], *, runs: int) -> list[float]:
    from sailfish.hardware.timing import Timer

    times = []
    timer = Timer("cpu")
    for _ in range(runs + 1):
        timer.start()
        calls[0]()
        times.append(timer.stop() * 1e6)
    return times[1:]
