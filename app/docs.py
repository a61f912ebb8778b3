"""The parts of the OpenAPI document that FastAPI can't derive: image bodies, problems, the key, and the texts."""

from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi

from app.errors import HTTP_KINDS, KINDS, PROBLEM_TYPE, Kind
from app.intake import ACCEPTED_TYPES
from app.middleware import is_guarded
from app.negotiation import JSON, NPY, PNG
from app.schemas import Problem

DESCRIPTION = """
Send a small H&E image, get the tissue it shows, how sure the model is, and where in the image it looked.

**In three steps:** open `POST /predict` below, press *Try it out*, choose a file, press *Execute*.
`POST /attention` with `format` = png shows a heatmap.

* Images are PNG, JPEG, TIFF, WebP or BMP, sent as the raw body or as a form field `file`.
* Give `mpp` (micrometres per pixel) unless a tag has it; else the whole centre square is one tile.
* Errors are `application/problem+json` with a stable `code`. 503 tells in `Retry-After` when to come back.
* Every answer carries `X-Request-ID` and `Server-Timing`, and names the model by the digest of its files.

Research and teaching only, not for diagnosis.
"""

TAGS = [
    {"name": "Images", "description": "One image or many in, what the model makes of them out."},
    {"name": "Model", "description": "What the model is, can and can't."},
    {"name": "Operation", "description": "For load balancers and monitoring."},
]

_FILE = {"type": "string", "format": "binary"}  # what lets the docs page offer a file picker
_RAW_BODIES: dict[str, Any] = {media_type: {"schema": _FILE} for media_type in ACCEPTED_TYPES}


def describe_form(field: str, schema: dict[str, Any]) -> dict[str, Any]:
    return {
        "multipart/form-data": {
            "schema": {
                "type": "object",
                "required": [field],
                "properties": {field: schema},
                "additionalProperties": False,
            },
            "encoding": {field: {"contentType": ", ".join(ACCEPTED_TYPES)}},
        }
    }


ONE_IMAGE = {
    "requestBody": {
        "required": True,
        "description": "The image: as form field `file`, or its bytes alone with their content type.",
        "content": {**describe_form("file", {**_FILE, "description": "The image"}), **_RAW_BODIES},
    }
}


def describe_many_images(limit: int) -> dict[str, Any]:
    files = {"type": "array", "items": _FILE, "minItems": 1, "maxItems": limit, "description": "The images"}
    return {
        "requestBody": {
            "required": True,
            "description": f"Up to {limit} images, each as a form field `files`.",
            "content": describe_form("files", files),
        }
    }


def describe_problems(*codes: str) -> dict[int | str, dict[str, Any]]:
    """The `responses` of a route that may answer with these problems, one entry a status, one example a code."""
    kinds = {kind.code: kind for kind in (*KINDS.values(), *HTTP_KINDS.values())}
    responses: dict[int | str, dict[str, Any]] = {}
    for kind in sorted((kinds[code] for code in codes), key=lambda kind: (kind.status, kind.code)):
        response = responses.setdefault(kind.status, describe_status(kind.status))
        response["description"] = " / ".join(filter(None, [response["description"], kind.title]))
        response["content"][PROBLEM_TYPE]["examples"][kind.code] = {"value": give_example(kind)}
    return responses


def describe_status(status: int) -> dict[str, Any]:
    schema = {"$ref": "#/components/schemas/Problem"}
    response: dict[str, Any] = {"description": "", "content": {PROBLEM_TYPE: {"schema": schema, "examples": {}}}}
    if status == 503:
        response["headers"] = {
            "Retry-After": {"description": "Seconds until it is worth trying again", "schema": {"type": "integer"}}
        }
    return response


def give_example(kind: Kind) -> dict[str, Any]:
    detail = "a sentence that says what came, what was expected and what to do"
    return kind.problem(detail, request_id="5f0c7d9c0f0e4c1d8d6f4f1f2b3a4c5d").model_dump(exclude_none=True)


_BODY = (
    *("no_image", "malformed_form", "unauthorized", "upload_stalled", "body_too_large", "too_many_uploads"),
    "unsupported_content_type",
)
_WORK = ("invalid_parameter", "wrong_field", "too_many_images", "queue_full", "shutting_down", "internal_error")
_IMAGE = (
    *("unsupported_format", "image_too_large", "undecodable_image", "animated_image", "image_too_small"),
    *("image_too_narrow", "mpp_out_of_range", "field_too_small", "image_refused", "deadline_exceeded"),
)
PREDICT_PROBLEMS = describe_problems(*_BODY, *_WORK, *_IMAGE, "coverage_unavailable")
BATCH_PROBLEMS = describe_problems(*_BODY, *_WORK, "mpp_out_of_range", "coverage_unavailable")
FEATURE_PROBLEMS = describe_problems(*_BODY, *_WORK, *_IMAGE, "not_acceptable")
ATTENTION_PROBLEMS = describe_problems(
    *(*_BODY, *_WORK, *_IMAGE, "not_acceptable", "coverage_unavailable"),
    *("unknown_target", "method_unavailable", "layer_out_of_range", "unsuitable_options"),
)
CARD_PROBLEMS = describe_problems("unauthorized", "internal_error")
READY_PROBLEMS = describe_problems("not_ready", "shutting_down", "queue_full", "internal_error")

MAP_BODIES: dict[str, Any] = {
    PNG: {"schema": _FILE},
    NPY: {"schema": {**_FILE, "description": "float32, G x G; with `layout=heads` L x H x G x G"}},
}
FEATURE_BODIES: dict[str, Any] = {JSON: {}, NPY: {"schema": {**_FILE, "description": "float32, one row"}}}


def write_openapi(app: FastAPI, *, has_keys: bool) -> dict[str, Any]:
    """FastAPI's document, plus the one error shape, plus the key where one is asked for."""
    document = get_openapi(
        title=app.title,
        version=app.version,
        summary=app.summary,
        description=app.description,
        routes=app.routes,
        tags=TAGS,
        servers=app.servers,
    )
    problem = Problem.model_json_schema(ref_template="#/components/schemas/{model}")
    document["components"]["schemas"] |= {**problem.pop("$defs", {}), "Problem": problem}
    for operation in list_operations(document):
        for parameter in operation.get("parameters", []):
            parameter["schema"] = drop_null(parameter["schema"])
    if has_keys:
        add_key(document)
    return document


def list_operations(document: dict[str, Any]) -> list[dict[str, Any]]:
    return [operation for operations in document["paths"].values() for operation in operations.values()]


def drop_null(schema: dict[str, Any]) -> dict[str, Any]:
    """A parameter can be left out, but a query string has no null."""
    kinds = [kind for kind in schema.get("anyOf", []) if kind != {"type": "null"}]
    if not kinds:
        return schema
    rest = {name: value for name, value in schema.items() if name != "anyOf"}
    return {**kinds[0], **rest} if len(kinds) == 1 else {**rest, "anyOf": kinds}


def add_key(document: dict[str, Any]) -> None:
    document["components"]["securitySchemes"] = {
        "Key": {"type": "apiKey", "in": "header", "name": "X-API-Key", "description": "One of the service's keys"},
        "Bearer": {"type": "http", "scheme": "bearer", "description": "The same keys as a token"},
    }
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            if is_guarded(method.upper(), path):
                operation["security"] = [{"Key": []}, {"Bearer": []}]
