"""Which exception becomes which answer: the one place that knows statuses."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.responses import Response

from app import schemas
from app.answers import CoverageUnavailable
from app.batcher import QueueFull, ShuttingDown
from app.deadline import DeadlineExceeded
from app.intake import EmptyBody, MalformedForm, StalledUpload, TooManyImages, WrongContentType, WrongField
from app.maps import LayerOutOfRange, MethodUnavailable, TargetUnknown, UnsuitableOptions
from app.middleware import BodyTooLarge, TooManyUploads, WrongKey
from app.negotiation import NothingAcceptable
from app.service import NotReady
from model.pixels import (
    AnimatedImage,
    EmptyImage,
    FieldTooSmall,
    ImageRefused,
    ImageTooLarge,
    ImageTooNarrow,
    ImageTooSmall,
    MppOutOfRange,
    UndecodableImage,
    UnsupportedFormat,
)

PROBLEM_TYPE = "application/problem+json"


@dataclass(frozen=True, slots=True)
class Kind:
    status: int
    code: str
    title: str

    def problem(
        self, detail: str, request_id: str | None = None, errors: list[schemas.ParameterError] | None = None
    ) -> schemas.Problem:
        return schemas.Problem(
            type=f"urn:tissue:problem:{self.code}",
            title=self.title,
            status=self.status,
            detail=detail,
            code=self.code,
            request_id=request_id,
            errors=errors,
        )


KINDS: dict[type[Exception], Kind] = {
    EmptyBody: Kind(400, "no_image", "There is no image"),
    MalformedForm: Kind(400, "malformed_form", "The form can't be read"),
    WrongKey: Kind(401, "unauthorized", "A key is needed"),
    NothingAcceptable: Kind(406, "not_acceptable", "None of the accepted types can be given"),
    StalledUpload: Kind(408, "upload_stalled", "The upload has stalled"),
    BodyTooLarge: Kind(413, "body_too_large", "The request is too large"),
    WrongContentType: Kind(415, "unsupported_content_type", "The content type is not supported"),
    WrongField: Kind(422, "wrong_field", "The form field has another name"),
    TooManyImages: Kind(422, "too_many_images", "There are too many images"),
    TargetUnknown: Kind(422, "unknown_target", "There is no such class"),
    MethodUnavailable: Kind(422, "method_unavailable", "The model has no such map"),
    LayerOutOfRange: Kind(422, "layer_out_of_range", "There is no such layer or head"),
    UnsuitableOptions: Kind(422, "unsuitable_options", "The options don't go together"),
    UnsupportedFormat: Kind(415, "unsupported_format", "The image format is not supported"),
    EmptyImage: Kind(400, "no_image", "There is no image"),
    ImageTooLarge: Kind(413, "image_too_large", "The image has too many pixels"),
    UndecodableImage: Kind(422, "undecodable_image", "The image can't be decoded"),
    AnimatedImage: Kind(422, "animated_image", "The file holds more than one image"),
    ImageTooSmall: Kind(422, "image_too_small", "The image is too small"),
    ImageTooNarrow: Kind(422, "image_too_narrow", "The image is too narrow"),
    MppOutOfRange: Kind(422, "mpp_out_of_range", "The scale is out of range"),
    FieldTooSmall: Kind(422, "field_too_small", "The image shows less than a tile"),
    ImageRefused: Kind(422, "image_refused", "The image is refused"),
    CoverageUnavailable: Kind(422, "coverage_unavailable", "The coverage is not available"),
    RequestValidationError: Kind(422, "invalid_parameter", "A parameter is invalid"),
    ClientDisconnect: Kind(499, "client_hung_up", "The client hung up"),
    QueueFull: Kind(503, "queue_full", "The service is busy"),
    TooManyUploads: Kind(503, "too_many_uploads", "Too much is being uploaded"),
    ShuttingDown: Kind(503, "shutting_down", "The service is shutting down"),
    NotReady: Kind(503, "not_ready", "The service is not ready"),
    DeadlineExceeded: Kind(504, "deadline_exceeded", "The answer took too long"),
    Exception: Kind(500, "internal_error", "Something went wrong here"),  # the cause is for the log only
}
HTTP_KINDS = {
    404: Kind(404, "not_found", "There is nothing here"),
    405: Kind(405, "method_not_allowed", "The method is not allowed here"),
}
UNKNOWN_PARAMETER = "this route has no such parameter; /docs shows all there are"
HTTP_DETAILS = {
    404: "no route has this path; /docs shows all there are",
    405: "this path has other methods, named in the Allow header; /docs shows all there are",
}


def find_kind(error: Exception) -> Kind:
    if isinstance(error, HTTPException):
        return HTTP_KINDS.get(error.status_code, Kind(error.status_code, f"http_{error.status_code}", error.detail))
    return next(KINDS[cls] for cls in type(error).__mro__ if cls in KINDS)


def describe_error(error: Exception, request_id: str) -> schemas.Problem:
    kind = find_kind(error)
    errors = list_parameters(error) if isinstance(error, RequestValidationError) else None
    return kind.problem(write_detail(error, kind), request_id, errors)


def respond(error: Exception, scope: Mapping[str, Any]) -> Response:
    problem = describe_error(error, scope["trace"].request_id)
    scope["trace"].problem = problem.code
    body = problem.model_dump_json(exclude_none=True)
    return Response(body, problem.status, choose_headers(error), media_type=PROBLEM_TYPE)


def write_detail(error: Exception, kind: Kind) -> str:
    if isinstance(error, RequestValidationError):
        return "; ".join(f"{entry.parameter}: {entry.message}" for entry in list_parameters(error))
    if isinstance(error, HTTPException):
        return HTTP_DETAILS.get(error.status_code, error.detail)
    if kind.status == 500:
        return "the cause is in the service's log, under the request id"
    return str(error) or kind.title


def list_parameters(error: RequestValidationError) -> list[schemas.ParameterError]:
    """Without the values that came: they may be anything, and logs and answers should not repeat them."""
    return [
        schemas.ParameterError(
            parameter=str(entry["loc"][1]),  # what follows are pydantic's names for the types that it tried
            message=UNKNOWN_PARAMETER if entry["type"] == "extra_forbidden" else entry["msg"],
        )
        for entry in error.errors()
    ]


def choose_headers(error: Exception) -> dict[str, str]:
    if isinstance(error, HTTPException):
        return dict(error.headers or {})
    if isinstance(error, QueueFull | TooManyUploads | ShuttingDown | NotReady):
        return {"Retry-After": str(error.retry_after_s)}
    return {"WWW-Authenticate": "Bearer"} if isinstance(error, WrongKey) else {}
