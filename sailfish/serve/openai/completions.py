"""POST /v1/completions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from msgspec import UNSET, UnsetType
from starlette.requests import Request
from starlette.responses import Response

from sailfish.base.errors import RequestError
from sailfish.engine.api import Chunk, Completion, FinishReason, TokenLogprob
from sailfish.serve.gateway.strict_json import read_object
from sailfish.serve.openai import logprobs
from sailfish.serve.openai.answers import Answers, fresh_envelope
from sailfish.serve.openai.endpoint import check_common, json_reply, whole_reply
from sailfish.serve.openai.replies import TextChoice, TextReply, UsageReply
from sailfish.serve.openai.requests import CompletionRequest, read
from sailfish.serve.openai.stream import EventStream, pieces
from sailfish.serve.site import Site

_DEFAULT_TOKENS = 16
"""What OpenAI generates when not told how much."""


async def create_completion(site: Site, http: Request) -> Response:
    """Continue one or more texts."""
    request = read(CompletionRequest, await read_object(http, site.limits))
    check_common(site, request)
    if request.best_of is not None and request.best_of != (request.n or 1):
        raise RequestError("best_of must equal n: every answer generated is returned", param="best_of")
    wants_prompt = request.prompt_logprobs
    if request.echo and request.logprobs is not None:
        wants_prompt = max(request.logprobs, wants_prompt or 0)
    max_tokens = _DEFAULT_TOKENS if request.max_tokens is None else request.max_tokens
    if max_tokens == 0 and not request.echo:
        raise RequestError(
            "max_tokens 0 needs echo to be true: there is no text otherwise", param="max_tokens"
        )
    params = request.sampling(
        max_tokens=max(max_tokens, 1), logprobs=request.logprobs, prompt_logprobs=wants_prompt
    )
    prompts = await _encode_prompts(site, request.prompt)
    shaper = _Shaper(site, request, prompts, params.n)
    answers = await Answers.start(
        site, request, prompts, params, tenant=http.state.tenant, is_scoring=max_tokens == 0
    )
    if request.stream:
        events = pieces(answers, [], shaper.piece, shaper.closing, request.stream_options)
        return EventStream(site, answers, events)
    completions = await whole_reply(site, answers, http.receive)
    return json_reply(shaper.whole(completions, answers.tally.reply()))


async def _encode_prompts(site: Site, prompt: Any) -> list[list[int]]:
    """Return the token ids of every prompt; raise a 400 for what is none of the four forms."""
    texts: Any = [prompt] if isinstance(prompt, str) else prompt
    if not isinstance(texts, list) or not texts:
        raise _malformed("an empty or missing prompt" if texts in ([], None) else type(prompt).__name__)
    if type(texts[0]) is int:
        texts = [texts]
    if len(texts) > site.limits.prompts:
        raise RequestError(
            f"the request has {len(texts)} prompts; at most {site.limits.prompts} are taken", param="prompt"
        )
    if all(isinstance(text, str) for text in texts):
        if not all(texts):
            raise _malformed("an empty text")
        return [await site.engine.encode(text) for text in texts]
    vocab_size = site.engine.info.vocab_size
    ids_of_all: list[list[int]] = texts
    for ids in ids_of_all:
        if not isinstance(ids, list) or not ids or not all(type(token) is int for token in ids):
            raise _malformed("a list that is neither texts nor token ids, or is empty")
        if not 0 <= min(ids) <= max(ids) < vocab_size:
            raise RequestError(
                f"the prompt has a token id outside 0 to {vocab_size - 1}, the model's vocabulary",
                param="prompt",
            )
    return ids_of_all


def _malformed(found: str) -> RequestError:
    return RequestError(
        f"prompt must be a text, a list of texts, a list of token ids or a list of such lists, not {found}",
        param="prompt",
        code="invalid_type",
    )


class _Shaper:
    """Gives chunks and completions the text completions' shape."""

    def __init__(self, site: Site, request: CompletionRequest, prompts: Sequence[list[int]], n: int) -> None:
        self._tokenizer = site.engine.tokenizer
        self._request = request
        self._prompts = prompts
        self._n = n
        options = request.stream_options
        self._usage = None if options and options.include_usage else UNSET
        self._offsets: dict[int, logprobs.Offsets] = {}
        """Where each choice's next token begins."""
        self._prompt_logprobs: dict[int, list[TokenLogprob | None]] = {}
        self._envelope = fresh_envelope(site, "cmpl")

    def piece(self, prompt: int, chunk: Chunk) -> TextReply:
        """Return one event with new text."""
        return self._reply([self._choice(prompt, chunk, chunk.finish_reason)], self._usage)

    def closing(self, usage: UsageReply) -> TextReply:
        """Return the event with the token counts."""
        return self._reply([], usage)

    def whole(self, completions: list[tuple[int, Completion]], usage: UsageReply) -> TextReply:
        """Return the reply that is not streamed."""
        choices = [self._choice(prompt, whole, whole.finish_reason) for prompt, whole in completions]
        return self._reply(choices, usage)

    def _choice(self, prompt: int, part: Chunk | Completion, finish: FinishReason | None) -> TextChoice:
        index = prompt * self._n + part.index
        is_first = index not in self._offsets
        if is_first:
            skips = self._request.skip_special_tokens is not False
            self._offsets[index] = logprobs.Offsets(self._tokenizer, skip_special=skips)
        offsets = self._offsets[index]
        text = part.text
        entries: list[TokenLogprob | None] = list(part.logprobs or [])
        ids = list(part.token_ids)
        starts: list[int] = []
        if is_first and self._request.echo:
            prompt_ids = self._prompts[prompt]
            text = self._tokenizer.decode(prompt_ids, skip_special=False) + text
            entries = [*self._prompt_entries(prompt, part), *entries]
            ids = prompt_ids + ids
            starts = offsets.of_prompt(prompt_ids)
        shaped = None
        if self._request.logprobs is not None:
            starts += [offsets.push(entry.token_id) for entry in part.logprobs or []]
            shaped = logprobs.for_text(self._tokenizer, entries, ids, starts)
        wanted = self._request.prompt_logprobs is not None and part.prompt_logprobs is not None
        return TextChoice(
            index=index,
            text=text,
            logprobs=shaped,
            finish_reason=finish,
            stop_reason=part.stop_reason,
            prompt_logprobs=logprobs.for_prompt(self._tokenizer, part.prompt_logprobs or [])
            if wanted
            else UNSET,
        )

    def _prompt_entries(self, prompt: int, part: Chunk | Completion) -> list[TokenLogprob | None]:
        """Return the prompt's log-probabilities; only its first answer brings them."""
        if part.prompt_logprobs is not None:
            self._prompt_logprobs[prompt] = part.prompt_logprobs
        return list(self._prompt_logprobs.get(prompt) or [None] * len(self._prompts[prompt]))

    def _reply(self, choices: list[TextChoice], usage: UsageReply | None | UnsetType) -> TextReply:
        return TextReply(**self._envelope, choices=choices, usage=usage)
