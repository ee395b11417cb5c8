"""Log-probabilities in the three shapes that clients expect."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sailfish.engine.api import TokenLogprob, TopLogprob
from sailfish.serve.openai.replies import (
    ChatLogprobs,
    ChatToken,
    PromptChance,
    PromptLogprobs,
    TextLogprobs,
    TokenChance,
)
from sailfish.serve.port import TokenizerPort

_LOWEST = -9999.0
"""Stands for minus infinity, which JSON cannot say."""


def token_string(tokenizer: TokenizerPort, token_id: int) -> str:
    """Return a token's text; bytes that are not whole characters as `bytes:\\xNN...`, as OpenAI does."""
    raw = tokenizer.token_bytes(token_id)
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)


def for_chat(tokenizer: TokenizerPort, entries: Sequence[TokenLogprob] | None) -> ChatLogprobs | None:
    """Return chat's shape: a list of tokens, each with its alternatives."""
    if entries is None:
        return None

    def parts(one: TokenLogprob | TopLogprob) -> dict[str, Any]:
        token, raw = token_string(tokenizer, one.token_id), tokenizer.token_bytes(one.token_id)
        return {"token": token, "logprob": max(one.logprob, _LOWEST), "bytes": list(raw)}

    content = [
        ChatToken(**parts(entry), top_logprobs=[TokenChance(**parts(top)) for top in entry.top])
        for entry in entries
    ]
    return ChatLogprobs(content=content)


class Offsets:
    """Where the tokens of one text begin in it, in characters: a token may be part of one, or skipped."""

    def __init__(self, tokenizer: TokenizerPort, *, skip_special: bool) -> None:
        self._tokenizer = tokenizer
        self._stream = tokenizer.stream(skip_special=skip_special)
        self._n_chars = 0

    def of_prompt(self, ids: Sequence[int]) -> list[int]:
        """Return the offsets of a prompt that is echoed whole before the answer."""
        answer, self._stream = self._stream, self._tokenizer.stream(skip_special=False)
        starts = [self.push(token_id) for token_id in ids]
        self._n_chars += len(self._stream.flush())
        self._stream = answer
        return starts

    def push(self, token_id: int) -> int:
        """Return the offset of the next token."""
        start = self._n_chars
        self._n_chars += len(self._stream.push(token_id))
        return start


def for_text(
    tokenizer: TokenizerPort,
    entries: Sequence[TokenLogprob | None],
    ids: Sequence[int],
    offsets: list[int],
) -> TextLogprobs:
    """Return the text completions' shape: parallel lists. `ids` name the tokens of entries that are None."""
    tokens: list[str] = []
    chances: list[float | None] = []
    tops: list[dict[str, float] | None] = []
    for i, entry in enumerate(entries):
        token = token_string(tokenizer, ids[i] if entry is None else entry.token_id)
        tokens.append(token)
        if entry is None:
            chances.append(None)
            tops.append(None)
            continue
        chances.append(max(entry.logprob, _LOWEST))
        top: dict[str, float] = {}
        for alternative in entry.top:  # best first; a text that two tokens share keeps the better one
            top.setdefault(token_string(tokenizer, alternative.token_id), max(alternative.logprob, _LOWEST))
        top.setdefault(token, max(entry.logprob, _LOWEST))
        tops.append(top)
    return TextLogprobs(tokens=tokens, token_logprobs=chances, top_logprobs=tops, text_offset=offsets)


def for_prompt(tokenizer: TokenizerPort, entries: Sequence[TokenLogprob | None]) -> PromptLogprobs:
    """Return vLLM's `prompt_logprobs`: per prompt token, token id to chance."""
    shaped: PromptLogprobs = []
    for entry in entries:
        if entry is None:
            shaped.append(None)
            continue
        chances = {a.token_id: a.logprob for a in entry.top} | {entry.token_id: entry.logprob}
        shaped.append(
            {
                str(token_id): PromptChance(
                    logprob=max(logprob, _LOWEST), decoded_token=token_string(tokenizer, token_id)
                )
                for token_id, logprob in chances.items()
            }
        )
    return shaped
