"""GET /openapi.json."""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from sailfish.serve.site import Site


async def openapi(site: Site, _: Request) -> Response:
    """Describe this server."""
    return JSONResponse({})
