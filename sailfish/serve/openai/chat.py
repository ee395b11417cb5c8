"""POST /v1/chat/completions."""

from __future__ import annotations

from msgspec import UNSET, UnsetType
from starlette.requests import Request
from starlette.responses import Response

from sailfish.base.errors import RequestError
from sailfish.engine.api import Chunk, Completion
from sailfish.serve.gateway.strict_json import read_object
from sailfish.serve.openai import logprobs
from sailfish.serve.openai.answers import Answers, fresh_envelope
from sailfish.serve.openai.endpoint import check_common, json_reply, whole_reply
from sailfish.serve.openai.replies import (
    ChatChoice,
    ChatChunk,
    ChatChunkChoice,
    ChatDelta,
    ChatMessage,
    ChatReply,
    PromptLogprobs,
    UsageReply,
)
from sailfish.serve.openai.requests import ChatRequest, read
from sailfish.serve.openai.stream import EventStream, pieces
from sailfish.serve.site import Site


async def create_chat_completion(site: Site, http: Request) -> Response:
    """Continue a conversation with one or more answers."""
    request = read(ChatRequest, await read_object(http, site.limits))
    check_common(site, request)
    if request.top_logprobs is not None and not request.logprobs:
        raise RequestError("top_logprobs needs logprobs to be true", param="top_logprobs")
    caps = [cap for cap in (request.max_tokens, request.max_completion_tokens) if cap is not None]
    params = request.sampling(
        max_tokens=min(caps, default=None),
        logprobs=(request.top_logprobs or 0) if request.logprobs else None,
        prompt_logprobs=request.prompt_logprobs,
    )
    prompt_ids = await site.engine.encode_chat(
        request.messages,
        add_generation_prompt=request.add_generation_prompt is not False,
        template_kwargs=request.chat_template_kwargs,
    )
    shaper = _Shaper(site, request)
    try:
        answers = await Answers.start(site, request, [prompt_ids], params, tenant=http.state.tenant)
    except RequestError as error:
        if error.param == "max_tokens" and request.max_completion_tokens == params.max_tokens:
            error.param = "max_completion_tokens"  # the engine knows one name only
        raise
    if request.stream:
        events = pieces(
            answers, shaper.opening(params.n), shaper.piece, shaper.closing, request.stream_options
        )
        return EventStream(site, answers, events)
    completions = await whole_reply(site, answers, http.receive)
    return json_reply(shaper.whole([completion for _, completion in completions], answers.tally.reply()))


class _Shaper:
    """Gives chunks and completions chat's shape."""

    def __init__(self, site: Site, request: ChatRequest) -> None:
        self._tokenizer = site.engine.tokenizer
        options = request.stream_options
        self._usage = None if options and options.include_usage else UNSET
        self._envelope = fresh_envelope(site, "chatcmpl")

    def opening(self, n: int) -> list[ChatChunk]:
        """Return the first event of every answer: whose turn it is."""
        delta = ChatDelta(role="assistant", content="")
        return [self._chunk([ChatChunkChoice(index=i, delta=delta)], self._usage) for i in range(n)]

    def piece(self, _: int, chunk: Chunk) -> ChatChunk:
        """Return one event with new text."""
        choice = ChatChunkChoice(
            index=chunk.index,
            delta=ChatDelta(content=chunk.text) if chunk.text else ChatDelta(),
            logprobs=logprobs.for_chat(self._tokenizer, chunk.logprobs),
            finish_reason=chunk.finish_reason,
            stop_reason=chunk.stop_reason if chunk.finish_reason else UNSET,
        )
        prompt = chunk.prompt_logprobs
        shaped = UNSET if prompt is None else logprobs.for_prompt(self._tokenizer, prompt)
        return self._chunk([choice], self._usage, shaped)

    def closing(self, usage: UsageReply) -> ChatChunk:
        """Return the event with the token counts."""
        return self._chunk([], usage)

    def whole(self, completions: list[Completion], usage: UsageReply) -> ChatReply:
        """Return the reply that is not streamed."""
        choices = [
            ChatChoice(
                index=completion.index,
                message=ChatMessage(content=completion.text),
                logprobs=logprobs.for_chat(self._tokenizer, completion.logprobs),
                finish_reason=completion.finish_reason,
                stop_reason=completion.stop_reason,
            )
            for completion in completions
        ]
        prompt = completions[0].prompt_logprobs
        return ChatReply(
            **self._envelope,
            choices=choices,
            usage=usage,
            prompt_logprobs=UNSET if prompt is None else logprobs.for_prompt(self._tokenizer, prompt),
        )

    def _chunk(
        self,
        choices: list[ChatChunkChoice],
        usage: UsageReply | None | UnsetType,
        prompt_logprobs: PromptLogprobs | UnsetType = UNSET,
    ) -> ChatChunk:
        return ChatChunk(**self._envelope, choices=choices, usage=usage, prompt_logprobs=prompt_logprobs)
