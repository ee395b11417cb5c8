"""An engine without a model: it answers with the bytes of its prompt, on a leash the test holds."""

from __future__ import annotations

import asyncio
import codecs
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from sailfish.base.errors import ContextTooLong, SailfishError
from sailfish.checkpoint.messages import Message
from sailfish.engine.api import (
    Chunk,
    EngineInfo,
    EngineStats,
    Options,
    SamplingParams,
    TokenLogprob,
    TopLogprob,
    Usage,
)

CONTEXT_TOKENS = 4096
EOS = 257


class FakeTokenizer:
    """One token per byte, and two control tokens."""

    vocab_size = 258
    bos_token = "<s>"
    eos_token = "</s>"

    def encode(self, text: str, *, special: bool = False, add_special: bool = True) -> list[int]:
        """Return the text's bytes."""
        return list(text.encode())

    def stream(self, *, skip_special: bool = True) -> FakeStreamOfText:
        """Return a decoder."""
        return FakeStreamOfText(skip_special=skip_special)

    def decode(self, ids: Sequence[int], *, skip_special: bool = True) -> str:
        """Return the text of ids."""
        pieces = [b"" if skip_special and token >= 256 else self.token_bytes(token) for token in ids]
        return b"".join(pieces).decode(errors="replace")

    def token_bytes(self, token_id: int) -> bytes:
        """Return one token's bytes."""
        return bytes([token_id]) if token_id < 256 else (b"<s>", b"</s>")[token_id - 256]


class FakeTemplate:
    """A chat template that only has its text."""

    source = "{{ messages }}"


class FakeStreamOfText:
    """Decodes bytes one by one."""

    def __init__(self, *, skip_special: bool) -> None:
        self._skip_special = skip_special
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token_id: int) -> str:
        """Return the character that a byte completes."""
        if token_id >= 256 and self._skip_special:
            return ""
        return self._utf8.decode(FakeTokenizer().token_bytes(token_id))

    def flush(self) -> str:
        """Return what half a character leaves."""
        return self._utf8.decode(b"", final=True)


@dataclass
class Submission:
    """What one call of `submit` was given."""

    prompt_ids: list[int]
    params: SamplingParams
    options: Options
    aborted: bool = False
    ended: bool = False


class FakeStream:
    """Sends the prompt back, one token a chunk, all answers in turn."""

    def __init__(self, engine: FakeEngine, submission: Submission) -> None:
        self._engine = engine
        self._submission = submission
        self._chunks = self._generate()

    def __aiter__(self) -> AsyncIterator[Chunk]:
        return self._chunks

    async def abort(self) -> None:
        """End the request."""
        if not self._submission.ended:
            self._submission.aborted = True
            self._engine.aborted.set()

    async def _generate(self) -> AsyncIterator[Chunk]:
        engine, submission, params = self._engine, self._submission, self._submission.params
        prompt = submission.prompt_ids
        n_tokens = min(params.max_tokens or engine.default_tokens, CONTEXT_TOKENS - len(prompt))
        for position in range(n_tokens):
            if position == engine.hold_after:
                engine.held.set()
                await engine.go_on.wait()
            if engine.fail_after == position:
                raise engine.failure
            await asyncio.sleep(0)
            for index in range(params.n):
                token = prompt[position % len(prompt)]
                is_last = position == n_tokens - 1
                yield Chunk(
                    index=index,
                    text=engine.tokenizer.decode([token]) * engine.text_repeat,
                    token_ids=[token],
                    logprobs=None if params.logprobs is None else [_chance(token, params.logprobs)],
                    prompt_logprobs=_prompt_chances(prompt, params, index) if position == 0 else None,
                    finish_reason=(None if not is_last else "length" if params.max_tokens else "stop"),
                    usage=Usage(len(prompt), n_tokens, 1) if is_last else None,
                )
        submission.ended = True


def _chance(token: int, n_top: int) -> TokenLogprob:
    return TokenLogprob(token, -0.5, [TopLogprob((token + i) % 256, -0.5 - i) for i in range(n_top)])


def _prompt_chances(
    prompt: list[int], params: SamplingParams, index: int
) -> list[TokenLogprob | None] | None:
    if params.prompt_logprobs is None or index > 0:
        return None
    return [None, *(_chance(token, params.prompt_logprobs or 0) for token in prompt[1:])]


@dataclass
class FakeEngine:
    """Implements the server's port."""

    template: FakeTemplate | None = field(default_factory=FakeTemplate)
    ready: str | None = None
    default_tokens: int = 5
    hold_after: int | None = None
    """Position at which every stream waits for `go_on`."""
    fail_after: int | None = None
    failure: SailfishError | RuntimeError = field(default_factory=lambda: RuntimeError("secret /path"))
    refuse: SailfishError | None = None
    text_repeat: int = 1
    submissions: list[Submission] = field(default_factory=list)
    reports: dict[str, dict[str, float]] = field(default_factory=dict)
    held: asyncio.Event = field(default_factory=asyncio.Event)
    go_on: asyncio.Event = field(default_factory=asyncio.Event)
    aborted: asyncio.Event = field(default_factory=asyncio.Event)
    tokenizer: FakeTokenizer = field(default_factory=FakeTokenizer)
    info: EngineInfo = field(
        default_factory=lambda: EngineInfo(
            name="fake",
            digest="sha256:0123456789abcdef",
            engine_dir="/nowhere",
            family="llama",
            device="cpu",
            dtype="float32",
            vocab_size=258,
            context_tokens=CONTEXT_TOKENS,
            page_tokens=16,
            n_blocks=64,
            max_sequences=8,
            max_queue=256,
            step_tokens=256,
            prefix_cache=True,
            eos_token_ids=[EOS],
            bos_token_id=None,
            defaults={},
            memory=[],
            started_s=0.1,
            pid=1,
        )
    )

    async def encode(self, text: str, *, add_special: bool = True) -> list[int]:
        """Return the text's bytes."""
        return list(text.encode())

    async def encode_chat(
        self,
        messages: Sequence[Message],
        *,
        add_generation_prompt: bool = True,
        template_kwargs: Mapping[str, Any] | None = None,
    ) -> list[int]:
        """Return the last message's bytes after a mark."""
        return list(f"#{messages[-1].for_template()['content']}".encode())

    async def submit(
        self,
        prompt_ids: list[int],
        params: SamplingParams,
        options: Options = Options(),
    ) -> FakeStream:
        """Start an answer, under the real engine's rules for what is refused."""
        params = params.checked(self.info.vocab_size)
        if self.refuse is not None:
            raise self.refuse
        if len(prompt_ids) + (params.max_tokens or 1) > CONTEXT_TOKENS:
            raise ContextTooLong(
                f"{len(prompt_ids)} prompt tokens and {params.max_tokens or 1} more exceed {CONTEXT_TOKENS}",
                param="prompt" if len(prompt_ids) >= CONTEXT_TOKENS else "max_tokens",
            )
        submission = Submission(prompt_ids, params, options)
        self.submissions.append(submission)
        return FakeStream(self, submission)

    async def stats(self) -> EngineStats:
        """Return plausible figures."""
        stats = EngineStats(
            running=2, waiting=1, blocks_total=64, blocks_used=16, finished={"stop": 3, "length": 1}
        )
        stats.time_to_first_token_s.observe(0.02)
        stats.refused = {"overloaded": 1}
        stats.clients = self.reports
        return stats

    def report(self, counters: dict[str, float]) -> None:
        """Keep this process's counters."""
        self.reports["this"] = counters
