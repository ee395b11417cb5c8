"""Every route there is, and the application made of them."""

from __future__ import annotations

from functools import partial

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route, Router

from sailfish.serve import health
from sailfish.serve.gateway.gate import Gate
from sailfish.serve.openai import chat, completions, models, replies, requests, tokens
from sailfish.serve.openapi import describe
from sailfish.serve.operation import Operation
from sailfish.serve.site import Site

OPERATIONS: tuple[Operation, ...] = (
    Operation(
        method="POST",
        path="/v1/chat/completions",
        endpoint=chat.create_chat_completion,
        takes=(requests.ChatRequest,),
        gives=replies.ChatReply,
        streams=replies.ChatChunk,
    ),
    Operation(
        method="POST",
        path="/v1/completions",
        endpoint=completions.create_completion,
        takes=(requests.CompletionRequest,),
        gives=replies.TextReply,
        streams=replies.TextReply,
    ),
    Operation(method="GET", path="/v1/models", endpoint=models.list_models, gives=replies.ModelList),
    Operation(method="GET", path="/v1/models/{model}", endpoint=models.get_model, gives=replies.ModelItem),
    Operation(
        method="POST",
        path="/tokenize",
        endpoint=tokens.tokenize,
        takes=(requests.TokenizePrompt, requests.TokenizeChat),
        gives=replies.TokenizeReply,
    ),
    Operation(
        method="POST",
        path="/detokenize",
        endpoint=tokens.detokenize,
        takes=(requests.DetokenizeRequest,),
        gives=replies.DetokenizeReply,
    ),
    Operation(
        method="GET", path="/tokenizer_info", endpoint=tokens.tokenizer_info, gives=replies.TokenizerInfo
    ),
    Operation(method="GET", path="/health", endpoint=health.readyz, gives=replies.StatusReply),
    Operation(method="GET", path="/readyz", endpoint=health.readyz, gives=replies.StatusReply),
    Operation(method="GET", path="/livez", endpoint=health.livez, gives=replies.StatusReply),
    Operation(method="GET", path="/version", endpoint=health.version, gives=replies.VersionReply),
    Operation(method="GET", path="/metrics", endpoint=health.metrics),
)


def create_app(site: Site) -> Gate:
    """Return the ASGI application of one API process."""
    routes = [
        Route(
            operation.path.replace("{model}", "{model:path}"),
            partial(operation.endpoint, site),
            methods=[operation.method],
        )
        for operation in OPERATIONS
    ]
    document = describe(site, OPERATIONS)

    async def openapi(_: Request) -> Response:
        return JSONResponse(document)

    routes.append(Route("/openapi.json", openapi, methods=["GET"]))
    return Gate(Router(routes, redirect_slashes=False), site)
