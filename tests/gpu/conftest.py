"""Nothing here is collected without a GPU; the suites are those of tests/cpu on another device."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from sailfish.kernels.cuda import program

collect_ignore_glob = [] if torch.cuda.is_available() else ["test_*.py"]
sys.path.insert(0, str(Path(__file__).parents[1] / "cpu"))


@pytest.fixture(params=["this device", "compute_80"])
def code(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Run the machine code of this card, or what cards that are newer than all we know run."""
    program.kernel.cache_clear()
    if request.param == "compute_80":
        monkeypatch.setattr(program, "architecture", lambda: "compute_80")
    yield request.param
    program.kernel.cache_clear()
