"""What several files of these tests replace."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType

import pytest

from sailfish.build import builder
from sailfish.compress.job import Done, Job
from sailfish.compress.worker import quantise
from sailfish.kernels.choose import choose_by_rows
from sailfish.kernels.cpu import library
from sailfish.plan.types import Dtype, WeightFormats


class InThisProcess:
    """Quantises as the process of its own does, without its start."""

    def __init__(
        self, checkpoint: Path, out: Path, formats: WeightFormats, *, dtype: Dtype, may_use_gpu: bool
    ) -> None:
        self._job = Job(
            checkpoint=str(checkpoint), out=str(out), formats=formats, dtype=dtype, may_use_gpu=may_use_gpu
        )

    def __enter__(self) -> InThisProcess:
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        return None

    def finish(self, tell: Callable[[int, int], None]) -> Done:
        """Do it."""
        return quantise(self._job, tell)


@pytest.fixture
def quantises_in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have engines' weights quantised without a process of its own, whose start takes seconds."""
    monkeypatch.setattr(builder, "Quantiser", InThisProcess)


@pytest.fixture
def has_no_library(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Take the CPU's kernels away, which round activations: plain torch keeps the numbers of the weights."""
    monkeypatch.setattr(library, "unavailable", lambda: "no C++ compiler is installed")
    choose_by_rows.cache_clear()
    yield
    choose_by_rows.cache_clear()
