"""The walk of one request stays short enough to read in one sitting."""

from __future__ import annotations

import pytest

from sailfish.base import trace
from sailfish.bench import walk
from sailfish.data import DEMO_MODEL_NAME


@pytest.mark.slow
def test_one_streamed_chat_request_passes_through_at_most_3000_lines() -> None:
    """Counted in every process, all lines of each function entered."""
    entered = walk.walk(DEMO_MODEL_NAME)
    rooms = {row.file.split("/")[0] for row in entered}
    assert {"serve", "engine", "models", "kernels", "checkpoint"} <= rooms
    assert trace.line_count(entered) <= walk.MAX_LINES
