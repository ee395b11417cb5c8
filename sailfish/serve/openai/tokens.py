"""POST /tokenize, POST /detokenize and GET /tokenizer_info: the model's tokenizer for remote use."""

from __future__ import annotations

import asyncio

from starlette.requests import Request
from starlette.responses import Response

from sailfish.base.errors import RequestError
from sailfish.serve.gateway.strict_json import read_object
from sailfish.serve.openai.endpoint import check_model, json_reply
from sailfish.serve.openai.logprobs import token_string
from sailfish.serve.openai.replies import DetokenizeReply, TokenizeReply, TokenizerInfo
from sailfish.serve.openai.requests import DetokenizeRequest, TokenizeChat, TokenizePrompt, read
from sailfish.serve.site import Site


async def tokenize(site: Site, http: Request) -> Response:
    """Return the token ids of a prompt or of a conversation."""
    value = await read_object(http, site.limits)
    request = read(TokenizeChat, value) if "messages" in value else read(TokenizePrompt, value)
    check_model(site, request.model)
    if isinstance(request, TokenizeChat):
        ids = await site.engine.encode_chat(
            request.messages, add_generation_prompt=request.add_generation_prompt is not False
        )
    else:
        ids = await asyncio.to_thread(
            site.engine.tokenizer.encode,
            request.prompt,
            special=True,
            add_special=request.add_special_tokens is not False,
        )
    texts = (
        [token_string(site.engine.tokenizer, token) for token in ids] if request.return_token_strs else None
    )
    return json_reply(
        TokenizeReply(
            count=len(ids), max_model_len=site.engine.info.context_tokens, tokens=ids, token_strs=texts
        )
    )


async def detokenize(site: Site, http: Request) -> Response:
    """Return the text of token ids."""
    request = read(DetokenizeRequest, await read_object(http, site.limits))
    check_model(site, request.model)
    vocab_size = site.engine.info.vocab_size
    if request.tokens and max(request.tokens) >= vocab_size:
        raise RequestError(f"token ids are 0 to {vocab_size - 1}", param="tokens")
    return json_reply(
        DetokenizeReply(prompt=site.engine.tokenizer.decode(request.tokens, skip_special=False))
    )


async def tokenizer_info(site: Site, _: Request) -> Response:
    """Return the special tokens and the chat template."""
    tokenizer, template = site.engine.tokenizer, site.engine.template
    return json_reply(
        TokenizerInfo(
            eos_token=tokenizer.eos_token,
            bos_token=tokenizer.bos_token,
            pad_token=tokenizer.eos_token,
            chat_template=None if template is None else template.source,
            vocab_size=site.engine.info.vocab_size,
            max_model_len=site.engine.info.context_tokens,
        )
    )
