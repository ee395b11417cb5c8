"""Steps that the endpoints share."""

from __future__ import annotations

from http import HTTPStatus

import msgspec
from starlette.responses import Response
from starlette.types import Receive

from sailfish.base.errors import RequestError
from sailfish.engine.api import Completion
from sailfish.serve.errors import Refusal
from sailfish.serve.openai.answers import Answers
from sailfish.serve.openai.requests import GenerateRequest
from sailfish.serve.site import Site
from sailfish.serve.tether import Tether


def check_model(site: Site, model: str | None) -> None:
    """Raise a 404 unless the model is the one that is served."""
    if model is not None and model != site.model:
        raise Refusal(
            HTTPStatus.NOT_FOUND,
            "model_not_found",
            f"that model is not served here; {site.model!r} is",
            param="model",
        )


def check_common(site: Site, request: GenerateRequest) -> None:
    """Check what is the same for chat and text completions."""
    check_model(site, request.model)
    if request.stream_options is not None and not request.stream:
        raise RequestError("stream_options needs stream to be true", param="stream_options")


def json_reply(value: msgspec.Struct) -> Response:
    """Return a struct as a JSON reply."""
    return Response(msgspec.json.encode(value), media_type="application/json")


async def whole_reply(site: Site, answers: Answers, receive: Receive) -> list[tuple[int, Completion]]:
    """Wait for all answers for as long as the client does."""
    tether = Tether()
    site.live.add(tether)
    try:
        return await tether.run(answers.whole(), receive)
    finally:
        site.live.discard(tether)
        await answers.close()
