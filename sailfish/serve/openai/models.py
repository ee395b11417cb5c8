"""GET /v1/models and /v1/models/{id}."""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import Response

from sailfish.serve.openai.endpoint import check_model, json_reply
from sailfish.serve.openai.replies import ModelItem, ModelList
from sailfish.serve.site import Site


async def list_models(site: Site, _: Request) -> Response:
    """List the one model that is served."""
    return json_reply(ModelList(data=[_item(site)]))


async def get_model(site: Site, http: Request) -> Response:
    """Describe a model by its name."""
    check_model(site, http.path_params["model"])
    return json_reply(_item(site))


def _item(site: Site) -> ModelItem:
    return ModelItem(
        id=site.model,
        created=site.started_unix_s,
        owned_by="sailfish",
        root=site.model,
        max_model_len=site.engine.info.context_tokens,
    )
