"""Tells schemathesis the one rule no JSON schema can state: prompt and answer share the context."""

from __future__ import annotations

from typing import Any

import schemathesis

LONGEST_PROMPT = 2048


@schemathesis.hook
def filter_body(_: Any, body: Any) -> bool:
    """Drop bodies whose max_tokens fits alone but maybe not beside the prompt."""
    if not isinstance(body, dict):
        return True
    caps = (body.get("max_tokens"), body.get("max_completion_tokens"))
    return not any(isinstance(cap, int | float) and LONGEST_PROMPT < cap < 4095 for cap in caps)
