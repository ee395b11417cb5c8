"""From one answer's tokens to its text: incremental detokenisation and stop strings, on the caller's side."""

from __future__ import annotations

from sailfish.base.errors import (
    DeadlineExceeded,
    EngineError,
    RequestAborted,
    SailfishError,
)
from sailfish.checkpoint.tokenizer import Tokenizer
from sailfish.engine.api import Chunk, SamplingParams, TokenLogprob, Usage
from sailfish.engine.wire import Event, Finish


class Answer:
    """One of a request's `n` answers as it grows."""

    def __init__(self, index: int, n_prompt: int, params: SamplingParams, tokenizer: Tokenizer) -> None:
        self.index = index
        self._n_prompt = n_prompt
        self._params = params
        self._decoder = tokenizer.stream(skip_special=params.skip_special_tokens)
        self._held = ""
        """Decoded text that may yet turn out to begin a stop string."""
        self._n_tokens = 0
        self._n_cached = 0

    def take(self, event: Event) -> Chunk:
        """Return the chunk that an engine event makes; raises how the answer failed.

        When the chunk ends the answer though the event does not, a stop string matched: the caller
        aborts the sequence.
        """
        self._n_cached = max(self._n_cached, event.n_cached)
        text = ""
        matched: str | None = None
        n_used = 0
        finish = event.finish
        for token_id in event.token_ids:
            n_used += 1
            self._n_tokens += 1
            is_stop_token = (
                finish is not None and finish.stop_token is not None and n_used == len(event.token_ids)
            )
            if is_stop_token and not self._params.include_stop:
                break
            self._held += self._decoder.push(token_id)
            piece, matched = self._release()
            text += piece
            if matched is not None:
                break
        if finish is not None and matched is None:
            self._held += self._decoder.flush()
            piece, matched = self._release()
            text += piece
            if matched is None:
                text, self._held = text + self._held, ""
                if finish.reason not in ("stop", "length"):
                    raise _failure(finish)
        is_last = matched is not None or finish is not None
        is_length = matched is None and finish is not None and finish.reason == "length"
        return Chunk(
            index=self.index,
            text=text,
            token_ids=event.token_ids[:n_used],
            logprobs=None if event.logprobs is None else event.logprobs[:n_used],
            prompt_logprobs=_with_first(event.prompt_logprobs),
            finish_reason=("length" if is_length else "stop") if is_last else None,
            stop_reason=matched if matched is not None else (None if finish is None else finish.stop_token),
            usage=Usage(self._n_prompt, self._n_tokens, self._n_cached) if is_last else None,
        )

    def _release(self) -> tuple[str, str | None]:
        """Take out of the held text what is certain; also the stop string that matched, if one did."""
        stops = self._params.stop
        if not stops or self._n_tokens < self._params.min_tokens:
            text, self._held = self._held, ""
            return text, None
        found = [(at, stop) for stop in stops if (at := self._held.find(stop)) >= 0]
        if found:
            at, stop = min(found)
            text = self._held[: at + len(stop)] if self._params.include_stop else self._held[:at]
            self._held = ""
            return text, stop
        n_keep = max(_overlap(self._held, stop) for stop in stops)
        cut = len(self._held) - n_keep
        text, self._held = self._held[:cut], self._held[cut:]
        return text, None


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that begins `stop`."""
    for n in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:n]):
            return n
    return 0


def _with_first(logprobs: list[TokenLogprob] | None) -> list[TokenLogprob | None] | None:
    """Put the None of the first prompt token, which nothing predicts, in front."""
    return None if logprobs is None else [None, *logprobs]


def _failure(finish: Finish) -> SailfishError:
    if finish.reason == "deadline":
        return DeadlineExceeded("the request's deadline passed before its answer was complete")
    if finish.reason == "abort":
        return RequestAborted(finish.message or "the request was ended before its answer was complete")
    return EngineError(finish.message or "the engine failed", code=finish.code or None)
