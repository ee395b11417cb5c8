"""The values that cross the engine's edge: what is asked, what comes back, what the engine says of itself.

No torch and no tokenizer here: the server, the command line and the tests share these types.
"""

from __future__ import annotations

import operator
from bisect import bisect_left
from collections.abc import Mapping, Sequence, Sized
from typing import Any, Literal, TypeVar

import msgspec

from sailfish.base.errors import RequestError

MAX_STOP_STRINGS = 16
MAX_STOP_CHARS = 512
MAX_LOGIT_BIAS = 1024
MAX_LOGPROBS = 20
MAX_N = 64
MAX_STOP_TOKEN_IDS = 64
_MAX_PRIORITY = 1_000_000

FinishReason = Literal["stop", "length"]


class SamplingParams(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """How to turn logits into tokens for one request. `None` always means "not asked for"."""

    max_tokens: int | None = None
    """Tokens to generate at most; None: until the context is full."""
    min_tokens: int = 0
    """End-of-text and stop tokens cannot be drawn before this many tokens."""
    temperature: float | None = None
    """0 is greedy. None: the checkpoint's default, else 1."""
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    """Over prompt and output (CTRL, Keskar et al. 2019). 1 is neutral."""
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    """Over output tokens, as OpenAI defines them."""
    logit_bias: dict[int, float] = {}
    seed: int | None = None
    """Draws depend on (seed, position) only. None: a fresh random seed."""
    stop: str | tuple[str, ...] = ()
    """One string, or several."""
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    n: int = 1
    logprobs: int | None = None
    """Alternatives to report per generated token (0: the drawn token alone)."""
    prompt_logprobs: int | None = None
    """The same for the prompt's tokens."""
    skip_special_tokens: bool = True
    include_stop: bool = False
    """Keep the matched stop string at the end of the text."""

    def checked(self, vocab_size: int) -> SamplingParams:
        """Return the same parameters with `stop` as a tuple; raise RequestError naming a bad field."""
        typed = _typed(self, SamplingParams, "sampling parameters")
        typed = msgspec.structs.replace(typed, stop=(self.stop,) if isinstance(self.stop, str) else self.stop)
        typed.check(vocab_size)
        return typed

    def check(self, vocab_size: int) -> None:
        """Raise RequestError naming the first field out of range."""
        _range("max_tokens", self.max_tokens, 1, 2**31 - 1)
        _range("min_tokens", self.min_tokens, 0, 2**31 - 1)
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise RequestError(
                f"min_tokens {self.min_tokens} exceeds max_tokens {self.max_tokens}", param="min_tokens"
            )
        _range("temperature", self.temperature, 0.0, 2.0)
        _range("top_k", self.top_k, 1, 2**31 - 1)
        _range("top_p", self.top_p, 0.0, 1.0, open_low=True)
        _range("min_p", self.min_p, 0.0, 1.0)
        _range("repetition_penalty", self.repetition_penalty, 0.0, 10.0, open_low=True)
        _range("presence_penalty", self.presence_penalty, -2.0, 2.0)
        _range("frequency_penalty", self.frequency_penalty, -2.0, 2.0)
        _range("seed", self.seed, -(2**63), 2**63 - 1)
        _range("n", self.n, 1, MAX_N)
        _range("logprobs", self.logprobs, 0, MAX_LOGPROBS)
        _range("prompt_logprobs", self.prompt_logprobs, 0, MAX_LOGPROBS)
        _few("logit_bias", self.logit_bias, MAX_LOGIT_BIAS)
        for token_id, bias in self.logit_bias.items():
            _token("logit_bias", token_id, vocab_size)
            _range("logit_bias", bias, -100.0, 100.0)
        _few("stop", self.stop, MAX_STOP_STRINGS)
        for text in self.stop:
            if not text or len(text) > MAX_STOP_CHARS:
                raise RequestError(f"stop strings have 1 to {MAX_STOP_CHARS} characters", param="stop")
        _few("stop_token_ids", self.stop_token_ids, MAX_STOP_TOKEN_IDS)
        for token_id in self.stop_token_ids:
            _token("stop_token_ids", token_id, vocab_size)


class Options(msgspec.Struct, frozen=True, kw_only=True):
    """How one request stands beside the others."""

    priority: int = 0
    """Lower goes first; one level weighs as much as 30 s of waiting, so nobody starves."""
    deadline_s: float | None = None
    """Seconds from now after which the answer is worthless."""
    tenant: str = ""
    """Tenants never share cached prefixes."""

    def checked(self) -> Options:
        """Return the same options; raise RequestError naming the first field that is wrong."""
        typed = _typed(self, Options, "options")
        _range("priority", typed.priority, -_MAX_PRIORITY, _MAX_PRIORITY)
        _range("deadline_s", typed.deadline_s, 0.0, 1e9, open_low=True)
        return typed


class TopLogprob(msgspec.Struct, frozen=True, array_like=True):
    """One alternative at one position."""

    token_id: int
    logprob: float


class TokenLogprob(msgspec.Struct, frozen=True, array_like=True):
    """A token, its log-probability under the raw logits, and the likeliest alternatives (best first)."""

    token_id: int
    logprob: float
    top: list[TopLogprob]


class Usage(msgspec.Struct, frozen=True):
    """Tokens a request used; `cached_tokens` of the prompt came from the prefix cache."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int = 0


class Chunk(msgspec.Struct, frozen=True, kw_only=True):
    """Newly generated text of one of a request's `n` answers. Only the last one has `finish_reason`."""

    index: int
    text: str
    token_ids: list[int]
    logprobs: list[TokenLogprob] | None = None
    prompt_logprobs: list[TokenLogprob | None] | None = None
    """On the first chunk only, one entry a prompt token; the first token has none."""
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None
    """The stop string or stop token that matched."""
    usage: Usage | None = None
    """With `finish_reason`: this answer's counts."""


class Completion(msgspec.Struct, frozen=True, kw_only=True):
    """One whole answer."""

    index: int
    text: str
    token_ids: list[int]
    finish_reason: FinishReason
    stop_reason: str | int | None
    logprobs: list[TokenLogprob] | None
    prompt_logprobs: list[TokenLogprob | None] | None
    usage: Usage

    @classmethod
    def joined(cls, chunks: list[Chunk]) -> Completion:
        """Return the whole answer that all chunks of one index make; the last has a finish_reason."""
        last = chunks[-1]
        assert last.finish_reason is not None and last.usage is not None
        has_logprobs = any(chunk.logprobs is not None for chunk in chunks)
        return cls(
            index=last.index,
            text="".join(chunk.text for chunk in chunks),
            token_ids=[token for chunk in chunks for token in chunk.token_ids],
            finish_reason=last.finish_reason,
            stop_reason=last.stop_reason,
            logprobs=[entry for chunk in chunks for entry in chunk.logprobs or []] if has_logprobs else None,
            prompt_logprobs=next((c.prompt_logprobs for c in chunks if c.prompt_logprobs is not None), None),
            usage=last.usage,
        )


class EngineInfo(msgspec.Struct, frozen=True, kw_only=True):
    """What a running engine is; constant from READY on."""

    name: str
    """The name the API calls this model by."""
    digest: str
    """The engine manifest's digest."""
    engine_dir: str
    family: str
    device: str
    dtype: str
    vocab_size: int
    context_tokens: int
    page_tokens: int
    n_blocks: int
    max_sequences: int
    max_queue: int
    """Sequences that may wait beside those that run."""
    step_tokens: int
    prefix_cache: bool
    eos_token_ids: list[int]
    bos_token_id: int | None
    defaults: dict[str, float]
    """Sampling defaults of generation_config.json, by SamplingParams field name."""
    memory: list[MemoryReading]
    weights: str = "plain"
    """Formats of the weights in words, as in "int4 (groups of 128), int8 head"; "plain": all are in dtype."""
    downgrades: list[str] = []
    """What the device forces below what the checkpoint offers, in words."""
    launches: dict[int, dict[str, int]] = {}
    """Launches of each kernel in a captured decode of up to so many sequences."""
    started_s: float
    """Seconds from process start to READY."""
    pid: int


class MemoryReading(msgspec.Struct, frozen=True):
    """One line of the memory plan beside what was measured, in bytes."""

    name: str
    planned_bytes: int
    measured_bytes: int | None


class Histogram(msgspec.Struct):
    """Counts per bucket, Prometheus style: `counts[i]` observations <= `bounds[i]`, the last is +Inf."""

    bounds: list[float]
    counts: list[int]
    total: float = 0.0

    @classmethod
    def of(cls, bounds: list[float]) -> Histogram:
        """Return an empty histogram with these upper bounds."""
        return cls(bounds=bounds, counts=[0] * (len(bounds) + 1))

    def observe(self, value: float, count: int = 1) -> None:
        """Count a value `count` times."""
        self.counts[bisect_left(self.bounds, value)] += count
        self.total += value * count


_LATENCY_S = [0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0]
_TOKENS = [1.0, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768]


class EngineStats(msgspec.Struct, kw_only=True):
    """Live figures of the engine process: gauges, and counters since its start."""

    running: int = 0
    waiting: int = 0
    blocks_total: int = 0
    blocks_used: int = 0
    """Blocks referenced by a sequence."""
    blocks_cached: int = 0
    """Unreferenced blocks that still hold a reusable prefix."""
    draining: bool = False
    steps: int = 0
    prompt_tokens: int = 0
    generated_tokens: int = 0
    prefix_query_tokens: int = 0
    prefix_hit_tokens: int = 0
    preemptions: int = 0
    finished: dict[str, int] = {}
    """Requests ended, by reason: stop, length, abort, deadline, error."""
    refused: dict[str, int] = {}
    """Requests refused at admission, by error code."""
    step_errors: int = 0
    reserved_bytes: int = 0
    """Device memory held now (CUDA: reserved by the allocator; CPU: resident set)."""
    time_to_first_token_s: Histogram = msgspec.field(default_factory=lambda: Histogram.of(_LATENCY_S))
    inter_token_s: Histogram = msgspec.field(default_factory=lambda: Histogram.of(_LATENCY_S))
    end_to_end_s: Histogram = msgspec.field(default_factory=lambda: Histogram.of(_LATENCY_S))
    queue_s: Histogram = msgspec.field(default_factory=lambda: Histogram.of(_LATENCY_S))
    prefill_s: Histogram = msgspec.field(default_factory=lambda: Histogram.of(_LATENCY_S))
    decode_s: Histogram = msgspec.field(default_factory=lambda: Histogram.of(_LATENCY_S))
    time_per_output_token_s: Histogram = msgspec.field(default_factory=lambda: Histogram.of(_LATENCY_S))
    """Mean time between the tokens of one sequence."""
    step_tokens: Histogram = msgspec.field(default_factory=lambda: Histogram.of(_TOKENS))
    clients: dict[str, dict[str, float]] = {}
    """Counters that each attached API process last reported of itself, by process name."""


def token_ids(prompt: Sequence[int], vocab_size: int) -> list[int]:
    """Return the prompt as plain ints; raises RequestError for what is no token id."""
    if isinstance(prompt, bytes | bytearray | Mapping):
        raise RequestError("the prompt must be text or token ids", param="prompt")
    try:
        ids = list(map(operator.index, prompt))
    except TypeError:
        raise RequestError("the prompt must be text or token ids", param="prompt") from None
    if ids and (min(ids) < 0 or max(ids) >= vocab_size):
        wrong = next(token_id for token_id in ids if not 0 <= token_id < vocab_size)
        raise RequestError(f"the prompt has token id {wrong}; ids are 0 to {vocab_size - 1}", param="prompt")
    return ids


T = TypeVar("T", bound=msgspec.Struct)


def _typed(value: T, kind: type[T], what: str) -> T:
    """Return the value with every field of the type it declares: a constructor checks none."""
    try:
        msgspec.msgpack.encode(value)  # a lone surrogate fails here, not on the wire
        if not isinstance(value, kind):
            raise TypeError(f"{type(value).__name__} is not {kind.__name__}")
        return msgspec.convert(msgspec.to_builtins(value), kind)
    except (msgspec.ValidationError, TypeError, UnicodeEncodeError, OverflowError) as error:
        raise RequestError(f"{what} are of the wrong type: {error}") from None


def _few(name: str, values: Sized, most: int) -> None:
    if len(values) > most:
        raise RequestError(f"{name} has {len(values)} entries, at most {most} are taken", param=name)


def _range(name: str, value: Any, low: float, high: float, *, open_low: bool = False) -> None:
    if value is None:
        return
    below = value <= low if open_low else value < low
    if below or not value <= high:  # `not <=` so that NaN is out of range too
        sign = "<" if open_low else "<="
        raise RequestError(
            f"{name} is {value!r}; it must be a number with {low} {sign} {name} <= {high}", param=name
        )


def _token(name: str, token_id: int, vocab_size: int) -> None:
    if not 0 <= token_id < vocab_size:
        raise RequestError(
            f"{name} names token {token_id}; the vocabulary has ids 0 to {vocab_size - 1}", param=name
        )
