"""Keeps a batch of requests from overrunning the engine's own queue."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager


class Pace:
    """Lets requests pass as long as their answers together fit the engine's rows."""

    def __init__(self, n_rows: int) -> None:
        self._n_rows = n_rows
        self._n_taken = 0
        self._changed = asyncio.Condition()

    @asynccontextmanager
    async def places(self, n_answers: int) -> AsyncIterator[None]:
        """Wait for that many rows, or for all of them if it is more, and hold them."""
        n_needed = min(n_answers, self._n_rows)
        async with self._changed:
            await self._changed.wait_for(lambda: self._n_taken + n_needed <= self._n_rows)
            self._n_taken += n_needed
        try:
            yield
        finally:
            async with self._changed:
                self._n_taken -= n_needed
                self._changed.notify_all()
