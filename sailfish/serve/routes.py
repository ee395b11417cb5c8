"""Every route: method, path, and the function that answers."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from functools import partial

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route, Router

from sailfish.serve import health, openapi
from sailfish.serve.gateway.gate import Gate
from sailfish.serve.openai import chat, completions, models, tokens
from sailfish.serve.site import Site

Endpoint = Callable[[Site, Request], Awaitable[Response]]

ROUTES: tuple[tuple[str, str, Endpoint], ...] = (
    ("POST", "/v1/chat/completions", chat.create_chat_completion),
    ("POST", "/v1/completions", completions.create_completion),
    ("GET", "/v1/models", models.list_models),
    ("GET", "/v1/models/{model:path}", models.get_model),
    ("POST", "/tokenize", tokens.tokenize),
    ("POST", "/detokenize", tokens.detokenize),
    ("GET", "/tokenizer_info", tokens.tokenizer_info),
    ("GET", "/health", health.readyz),
    ("GET", "/readyz", health.readyz),
    ("GET", "/livez", health.livez),
    ("GET", "/metrics", health.metrics),
    ("GET", "/version", health.version),
    ("GET", "/openapi.json", openapi.openapi),
)


def create_app(site: Site) -> Gate:
    """Return the ASGI application of one API process."""
    routes = [Route(path, partial(endpoint, site), methods=[method]) for method, path, endpoint in ROUTES]
    return Gate(Router(routes, redirect_slashes=False), site)
