"""A batch never has more answers at work than there are rows, and every request gets its turn."""

from __future__ import annotations

import asyncio

from hypothesis import given, settings
from hypothesis import strategies as st

from sailfish.engine.pace import Pace


@given(st.integers(1, 8), st.lists(st.integers(1, 20), max_size=30))
@settings(max_examples=60, deadline=None)
def test_rows_are_never_overrun_and_nobody_is_forgotten(n_rows: int, sizes: list[int]) -> None:
    async def scenario() -> None:
        pace, at_work, served = Pace(n_rows), 0, 0

        async def request(n_answers: int) -> None:
            nonlocal at_work, served
            async with pace.places(n_answers):
                at_work += min(n_answers, n_rows)
                assert at_work <= n_rows
                await asyncio.sleep(0)
                at_work -= min(n_answers, n_rows)
                served += 1

        await asyncio.wait_for(asyncio.gather(*map(request, sizes)), timeout=20)
        assert served == len(sizes)

    asyncio.run(scenario())
