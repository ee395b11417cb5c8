"""The model that ships inside the package."""

from __future__ import annotations

from pathlib import Path

DEMO_MODEL_NAME = "books-4m"


def demo_model() -> Path:
    """Return the directory of the packaged checkpoint."""
    return Path(__file__).parent / DEMO_MODEL_NAME


def sample_text() -> Path:
    """Return a text that a larger model of the same books wrote, to calibrate and to measure with."""
    return Path(__file__).parent / "sample.txt.xz"
