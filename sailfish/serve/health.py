"""GET /livez, /readyz, /health, /version and /metrics: what watches the server asks."""

from __future__ import annotations

from http import HTTPStatus

from starlette.requests import Request
from starlette.responses import Response

from sailfish.serve.errors import Refusal
from sailfish.serve.metrics import prometheus
from sailfish.serve.openai.endpoint import json_reply
from sailfish.serve.openai.replies import StatusReply, VersionReply
from sailfish.serve.site import Door, Site
from sailfish.version import __version__


async def livez(_: Door, __: Request) -> Response:
    """Tell that this process answers; never fails while it loads or drains."""
    return json_reply(StatusReply())


async def readyz(door: Door, _: Request) -> Response:
    """Tell whether requests are taken, and if not, why."""
    reason = door.not_ready()
    if reason is not None:
        raise Refusal(HTTPStatus.SERVICE_UNAVAILABLE, "not_ready", reason, retry_after_s=1.0)
    return json_reply(StatusReply())


async def version(_: Door, __: Request) -> Response:
    """Return the server's version."""
    return json_reply(VersionReply(version=__version__))


async def metrics(site: Site, _: Request) -> Response:
    """Return every metric in Prometheus' text format."""
    site.engine.report(site.counters.flat())
    stats = await site.engine.stats()
    text = prometheus.render(site.engine.info, stats, model=site.model, vllm=site.vllm_metrics)
    return Response(text, media_type=prometheus.CONTENT_TYPE)
