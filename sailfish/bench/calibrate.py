"""What the machine itself gives right now: read bandwidth and a large matrix product."""

from __future__ import annotations

import statistics
from collections.abc import Callable

_READ_BYTES = {"cpu": 1 << 28, "cuda": 1 << 32}
_SQUARE = {"cpu": 1024, "cuda": 8192}
_RUNS = 7


def calibrate(device: str) -> dict[str, float]:
    """Return read bandwidth in GB/s (a sum over a large tensor) and bfloat16 TFLOP/s of a square product.

    Random data, median of seven after one warm-up. `device` is "cpu" or "cuda".
    """
    import torch

    from sailfish.hardware.memory import release_cuda
    from sailfish.hardware.timing import Timer

    n_bytes, side = _READ_BYTES[device], _SQUARE[device]
    generator = torch.Generator(device).manual_seed(0)
    words = torch.randint(0, 1 << 30, (n_bytes // 4,), dtype=torch.int32, device=device, generator=generator)
    floats = words.view(torch.float32)
    a, b = torch.randn(2, side, side, device=device, generator=generator).to(torch.bfloat16)

    def seconds(work: Callable[[], torch.Tensor]) -> float:
        runs = []
        timer = Timer(device)
        for _ in range(_RUNS + 1):
            timer.start()
            work()
            runs.append(timer.stop())
        return statistics.median(runs[1:])

    read_s = seconds(lambda: floats.sum())
    product_s = seconds(lambda: a @ b)
    if device == "cuda":
        del words, floats, a, b
        release_cuda()  # the engine that is measured next shares the device
    return {
        "read_gb_per_s": round(n_bytes / read_s / 1e9, 1),
        f"bf16_{side}_tflop_per_s": round(2 * side**3 / product_s / 1e12, 2),
    }
