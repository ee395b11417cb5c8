"""Describes the server as an OpenAPI 3.1 document, made from the types of the bodies."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import msgspec
from msgspec import Struct

from sailfish.serve.errors import ErrorReply
from sailfish.serve.gateway.gate import PUBLIC_PATHS
from sailfish.serve.openai.requests import REFUSED, ChatRequest, TokenizeChat
from sailfish.serve.operation import Operation
from sailfish.serve.site import Site
from sailfish.version import __version__

Json = dict[str, Any]

_REFS = "#/components/schemas/{name}"
_ERRORS = {
    400: "The request is wrong.",
    401: "No valid API key was sent.",
    403: "The Host header is not one this server answers to.",
    404: "There is no such route or model.",
    405: "The route does not take that method.",
    408: "The request came too slowly, or its deadline passed.",
    411: "The request has no body.",
    413: "The body is too large.",
    415: "The body is not plain application/json.",
    429: "This key has too many requests at work.",
    431: "The headers are too large.",
    500: "The engine failed.",
    503: "Not now: overloaded, loading or draining.",
}


def describe(site: Site, operations: Sequence[Operation]) -> Json:
    """Return the document of a server with these routes."""
    kinds: list[type[Struct]] = [ErrorReply]
    if site.engine.template is None:
        operations = [operation for operation in operations if ChatRequest not in operation.takes]
    for operation in operations:
        kinds += [kind for kind in (*operation.takes, operation.gives, operation.streams) if kind is not None]
    _, schemas = msgspec.json.schema_components(kinds, ref_template=_REFS)
    for kind, fields in REFUSED.items():
        for name, neutral in fields.items() if kind.__name__ in schemas else ():
            schemas[kind.__name__]["properties"][name] = {"enum": list(neutral)}
    _narrow(schemas, site)
    document: Json = {
        "openapi": "3.1.0",
        "info": {"title": "Sailfish", "version": __version__, "x-limits": dict(site.limits.rows())},
        "paths": {},
        "components": {"schemas": schemas},
    }
    for operation in operations:
        path = document["paths"].setdefault(operation.path, {})
        path[operation.method.lower()] = _operation(site, operation)
    if len(site.keys):
        document["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
    return document


def _operation(site: Site, operation: Operation) -> Json:
    about: Json = {
        "operationId": getattr(operation.endpoint, "__name__", "") + operation.path.replace("/", "_"),
        "summary": inspect.getdoc(operation.endpoint),
        "responses": {str(status): _error(text) for status, text in _ERRORS.items()},
    }
    if operation.gives is None:
        content: Json = {"text/plain": {"schema": {"type": "string"}}}
    else:
        content = {"application/json": {"schema": _ref(operation.gives)}}
    if operation.streams is not None:
        event = {"type": "object", "required": ["data"], "properties": {"data": {"type": "string"}}}
        content["text/event-stream"] = {"schema": event, "x-data": _ref(operation.streams)}
    about["responses"]["200"] = {"description": "Done.", "headers": _HEADERS, "content": content}
    if operation.takes:
        has_chat = site.engine.template is not None
        forms = [_ref(kind) for kind in operation.takes if has_chat or kind is not TokenizeChat]
        schema = forms[0] if len(forms) == 1 else {"anyOf": forms}
        about["requestBody"] = {"required": True, "content": {"application/json": {"schema": schema}}}
    if "{model}" in operation.path:
        schema = {"enum": [site.model]}
        about["parameters"] = [{"name": "model", "in": "path", "required": True, "schema": schema}]
    if len(site.keys) and operation.path not in PUBLIC_PATHS:
        about["security"] = [{"key": []}]
    return about


_HEADERS: Json = {"x-request-id": {"required": True, "schema": {"type": "string"}}}


def _error(text: str) -> Json:
    content = {"application/json": {"schema": _ref(ErrorReply)}}
    return {"description": text, "headers": _HEADERS, "content": content}


def _ref(kind: type[Struct]) -> Json:
    return {"$ref": _REFS.format(name=kind.__name__)}


def _narrow(schemas: dict[str, Json], site: Site) -> None:
    """Add what only the engine knows, and the rules between two fields, which types cannot say."""
    info = site.engine.info
    last_id = info.vocab_size - 1
    token = {"type": "integer", "minimum": 0, "maximum": last_id}
    ids = {"type": "array", "items": token, "minItems": 1, "maxItems": info.context_tokens - 1}
    text = {"type": "string", "minLength": 1}
    for name, schema in schemas.items():
        fields = schema.get("properties", {})
        if name in ("ChatRequest", "CompletionRequest"):
            fields["model"] = {"enum": [site.model]}
            for field in {"max_tokens", "max_completion_tokens"} & fields.keys():
                fields[field]["anyOf"][0]["maximum"] = info.context_tokens - 1
            fields["stop_token_ids"]["anyOf"][0]["items"] = token
            fields["logit_bias"]["anyOf"][0]["propertyNames"] = {"pattern": pattern_up_to(last_id)}
            schema["allOf"] = [_needs("stream_options", "object", "stream")]
        elif "model" in fields and "required" in schema and name.endswith(("Prompt", "Chat", "Request")):
            fields["model"] = {"enum": [site.model, None]}
    schemas["DetokenizeRequest"]["properties"]["tokens"]["items"] = token
    if "ChatRequest" in schemas:
        schemas["ChatRequest"]["allOf"].append(_needs("top_logprobs", "integer", "logprobs"))
    # best_of may be any n, which no schema can say; this says it for the one value that clients send unasked
    schemas["CompletionRequest"]["properties"]["best_of"] = {"enum": [1, None]}
    schemas["CompletionRequest"]["allOf"].append(
        {"if": _given("best_of", "integer"), "then": {"properties": {"n": {"enum": [1, None]}}}}
    )
    schemas["CompletionRequest"]["allOf"].append(
        {
            "if": {"required": ["max_tokens"], "properties": {"max_tokens": {"const": 0}}},
            "then": {"required": ["echo"], "properties": {"echo": {"const": True}}},
        }
    )
    most = site.limits.prompts
    schemas["CompletionRequest"]["properties"]["prompt"] = {
        "anyOf": [
            text,
            ids,
            {"type": "array", "items": text, "minItems": 1, "maxItems": most},
            {"type": "array", "items": ids, "minItems": 1, "maxItems": most},
        ]
    }


def _needs(field: str, kind: str, switch: str) -> Json:
    then = {"required": [switch], "properties": {switch: {"const": True}}}
    return {"if": _given(field, kind), "then": then}


def _given(field: str, kind: str) -> Json:
    return {"required": [field], "properties": {field: {"type": kind}}}


def pattern_up_to(last: int) -> str:
    """Return the regular expression of the decimal numbers 0 .. last, without leading zeros."""
    digits = str(last)
    forms = [f"[1-9][0-9]{{{n}}}" if n else "[0-9]" for n in range(len(digits) - 1)]
    for i, digit in enumerate(digits):
        lowest = 1 if i == 0 and len(digits) > 1 else 0
        if int(digit) > lowest:
            rest = len(digits) - i - 1
            forms.append(digits[:i] + f"[{lowest}-{int(digit) - 1}]" + (f"[0-9]{{{rest}}}" if rest else ""))
    return f"^({'|'.join([*forms, digits])})$"
