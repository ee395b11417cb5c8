"""Nothing here is collected without a GPU; the suites are those of tests/cpu on another device."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

collect_ignore_glob = [] if torch.cuda.is_available() else ["test_*.py"]
sys.path.insert(0, str(Path(__file__).parents[1] / "cpu"))
