"""One answer in the making: its tokens, its counters, and the events its owner receives."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import InitVar, dataclass, field

import msgspec

from sailfish.engine.api import TokenLogprob
from sailfish.engine.kv.prefix import child_hash
from sailfish.engine.step import RowSampling
from sailfish.engine.wire import Finish

SequenceKey = tuple[int, int]
"""The client's number, and the number that this client gave the sequence."""

_PRIORITY_S = 30.0  # one level of priority is worth this much waiting, so nobody starves


class SequenceEvent(msgspec.Struct, frozen=True):
    """News of one sequence; exactly one event of each accepted sequence has `finish`."""

    key: SequenceKey
    token_ids: list[int] = []
    """New tokens; the stop token is among them."""
    logprobs: list[TokenLogprob] | None = None
    prompt_logprobs: list[TokenLogprob] | None = None
    """With the first token: one entry for each prompt token but the first."""
    n_cached: int = 0
    """Tokens of the prompt that came from the prefix cache."""
    finish: Finish | None = None


class Draws(msgspec.Struct, frozen=True):
    """One more token of each of some sequences that go on, and nothing else to tell of them."""

    keys: list[SequenceKey]
    token_ids: list[int]


@dataclass(slots=True, kw_only=True, eq=False)
class Sequence:
    """A prompt and the tokens generated so far. `n_computed` chases `n_wanted`."""

    key: SequenceKey
    prompt_ids: InitVar[list[int]]
    sampling: RowSampling
    max_tokens: int | None
    """Tokens to generate at most; None: until the context is full."""
    arrival_s: float
    priority: int = 0
    """Lower runs earlier; one level weighs as much as 30 s of waiting."""
    deadline_s: float | None = None
    """When the whole answer is worthless, on the clock of `arrival_s`."""
    tenant: str = ""
    """Prefixes are shared only between sequences of equal tenant and adapter."""
    adapter: str = ""
    needs_host: bool = False
    """The host must see each token before the next one is drawn."""

    token_ids: list[int] = field(init=False)
    """The prompt, then the output tokens known."""
    n_prompt: int = field(init=False)
    order: tuple[float, int] = field(init=False, default=(0.0, 0))
    """Ascending: who comes first."""
    limit_tokens: int = field(init=False, default=0)
    """Prompt and output together never exceed this."""
    stop_ids: frozenset[int] = field(init=False)
    n_wanted: int = field(init=False)
    """Tokens that exist: the known ones, and those drawn but not yet seen."""
    n_computed: int = field(init=False, default=0)
    """Positions whose KV is written by the steps planned so far."""
    quiet_until: int = field(init=False, default=0)
    """While it decodes, positions before this one change nothing but the counters: no block begins or is
    filled, and no draw is the first or the last."""
    row: int | None = field(init=False, default=None)
    block_ids: list[int] = field(init=False, default_factory=list)
    cache_root: bytes | None = field(init=False, default=None)
    """Parent of the first block's hash, once known."""
    block_hashes: list[bytes] = field(init=False, default_factory=list)
    n_indexed: int = field(init=False, default=0)
    """Leading blocks already offered to the prefix index."""
    prompt_scores: list[TokenLogprob] | None = field(init=False, default=None)
    """Prompt logprobs so far; None once delivered, or if not asked for."""
    n_cached: int = field(init=False, default=0)
    scheduled_s: float | None = field(init=False, default=None)
    first_token_s: float | None = field(init=False, default=None)
    last_token_s: float | None = field(init=False, default=None)

    def __post_init__(self, prompt_ids: list[int]) -> None:
        self.token_ids = list(prompt_ids)
        self.n_prompt = self.n_wanted = len(self.token_ids)
        self.stop_ids = frozenset(self.sampling.stop_token_ids)
        if self.sampling.prompt_logprobs is not None:
            self.prompt_scores = []

    @property
    def n_output(self) -> int:
        """Output tokens known."""
        return len(self.token_ids) - self.n_prompt

    @property
    def n_pending(self) -> int:
        """Tokens drawn but not yet seen."""
        return self.n_wanted - len(self.token_ids)

    @property
    def n_left(self) -> int:
        """Positions still to compute before the next token can be drawn."""
        return self.n_wanted - self.n_computed

    def accept(self, serial: int, context_tokens: int) -> None:
        """Take a place in the order and a limit; `serial` breaks ties in arrival."""
        self.order = (self.arrival_s + self.priority * _PRIORITY_S, serial)
        room = context_tokens - self.n_prompt
        self.limit_tokens = self.n_prompt + (room if self.max_tokens is None else self.max_tokens)

    def hashes(self, root: bytes, start: int, end: int, page_tokens: int) -> Iterator[bytes]:
        """Yield the hashes of blocks start .. end, all of them full and known.

        Each is computed once and only when it is asked for: a look-up stops at the first block missed.
        """
        chain = self.block_hashes
        for i in range(start, end):
            if i == len(chain):
                parent = chain[-1] if chain else root
                chain.append(child_hash(parent, self.token_ids[i * page_tokens : (i + 1) * page_tokens]))
            yield chain[i]

    def forget_work(self) -> None:
        """Forget everything computed and every draw not yet seen; known tokens stay."""
        self.quiet_until = 0
        self.row = None
        self.n_computed = 0
        self.n_wanted = len(self.token_ids)
        if self.prompt_scores is not None:
            self.prompt_scores = []
