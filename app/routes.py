"""Thin handlers: read the options and the body, ask the service, choose the form of the answer."""

import asyncio
import io
import logging
import time
from pathlib import Path
from typing import Annotated

import numpy as np
from fastapi import APIRouter, Query, Request
from fastapi.responses import FileResponse, Response
from numpy.typing import NDArray
from pydantic import TypeAdapter

from app import docs, schemas
from app.answers import describe_attention, describe_input, write_caption
from app.batcher import QueueFull
from app.deadline import DeadlineExceeded, attended
from app.errors import describe_error
from app.intake import Upload, read_image, read_images
from app.maps import Drawable, choose_method
from app.metrics import CONTENT_TYPE, Metrics
from app.negotiation import JSON, NPY, PNG, choose_type
from app.options import OptionsRoute
from app.overlay import draw_heads, draw_overlay
from app.samples import Sample
from app.service import Service, count_places
from app.trace import Trace

log = logging.getLogger("tissue")

MAX_IMAGES = 64  # in one batch request: with the body limit it bounds what one client can put into memory
SIDE_BY_SIDE = 8  # images of one batch under way at a time, so that it doesn't push all others out of the queue
RETRY_S = 0.05  # how long one of them waits before it asks for a place again

WEB = Path(__file__).parent / "web"
PAGE_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data: blob:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
# The page's own scripts write text only: the browser refuses whatever would turn a string into HTML.
PEOPLE_POLICY = PAGE_POLICY + "; require-trusted-types-for 'script'; trusted-types 'none'"
# Swagger UI and ReDoc set styles from their scripts, and ReDoc searches in a worker it makes itself.
DOCS_POLICY = PAGE_POLICY.replace("style-src 'self'", "style-src 'self' 'unsafe-inline'") + "; worker-src blob:"

BatchItems = list[schemas.AnsweredItem | schemas.FailedItem]
_batch_items: TypeAdapter[BatchItems] = TypeAdapter(BatchItems)

router = APIRouter(route_class=OptionsRoute)


# The handlers call these instead of declaring them as dependencies, which FastAPI resolves anew for every request: that
# takes more than half as long as all else in this file.
def find_service(request: Request) -> Service:
    service: Service = request.app.state.service
    return service


def find_trace(request: Request) -> Trace:
    trace: Trace = request.scope["trace"]
    return trace


@router.post(
    "/predict",
    tags=["Images"],
    summary="Tell which tissue an image shows",
    response_model=schemas.Prediction,
    response_description="The prediction",
    responses=docs.PREDICT_PROBLEMS,
    openapi_extra=docs.ONE_IMAGE,
)
async def predict(request: Request, options: Annotated[schemas.PredictOptions, Query()]) -> Response:
    """Which tissue, how sure, and any cause for doubt."""
    service, trace = find_service(request), find_trace(request)
    service.let_in(options)
    with trace.measure("upload"):
        upload = await read_image(request)
    async with attended(request, service.deadline_s):
        prediction = await service.predict(upload.data, trace, options)
    return Response(prediction.model_dump_json(), media_type=JSON)


@router.post(
    "/predict/batch",
    tags=["Images"],
    summary=f"The same for up to {MAX_IMAGES} images",
    response_model=BatchItems,
    response_description="One item an image, in order",
    responses=docs.BATCH_PROBLEMS,
    openapi_extra=docs.describe_many_images(MAX_IMAGES),
)
async def predict_batch(request: Request, options: Annotated[schemas.PredictOptions, Query()]) -> Response:
    """One item an image, in order: its prediction, or its own error. A bad image fails alone."""
    service, trace = find_service(request), find_trace(request)
    service.let_in(options)
    with trace.measure("upload"):
        uploads = await read_images(request, MAX_IMAGES)
    side_by_side = asyncio.Semaphore(max(1, min(SIDE_BY_SIDE, service.settings.max_queue // count_places(options))))
    deadline = time.monotonic() + service.deadline_s

    metrics: Metrics = request.app.state.metrics

    async def answer(upload: Upload) -> schemas.AnsweredItem | schemas.FailedItem:
        own = Trace(trace.request_id)  # sums over what runs side by side would be longer than the request
        try:
            async with asyncio.timeout(deadline - time.monotonic()), side_by_side:
                prediction = await predict_in_turn(service, upload, own, options)
        except Exception as error:
            failed = fail_item(upload, error, service.deadline_s, trace.request_id)
            metrics.problems.labels(failed.error.code).inc()
            return failed
        finally:
            metrics.observe_stages(own.stages_s)
        return schemas.AnsweredItem.model_construct(file=upload.name, **dict(prediction))

    async with attended(request, None):  # the items have the deadline: those that meet it are not lost
        items = await asyncio.gather(*map(answer, uploads))
    return Response(_batch_items.dump_json(items), media_type=JSON)


async def predict_in_turn(
    service: Service, upload: Upload, trace: Trace, options: schemas.PredictOptions
) -> schemas.Prediction:
    """Waits for a place, or one moment without room would refuse this image and at once all that come behind it."""
    while True:
        try:
            return await service.predict(upload.data, trace, options)
        except QueueFull:
            await asyncio.sleep(RETRY_S)


def fail_item(upload: Upload, error: Exception, deadline_s: float, request_id: str) -> schemas.FailedItem:
    if isinstance(error, TimeoutError):
        error = DeadlineExceeded(f"there was no answer within {deadline_s:g} s; send fewer images at a time")
    problem = describe_error(error, request_id)
    if problem.status == 500:
        log.error("failed", exc_info=error, extra={"request_id": request_id})
    return schemas.FailedItem(file=upload.name, error=problem)


@router.post(
    "/attention",
    tags=["Images"],
    summary="Show where in an image the model looked",
    response_model=schemas.Attention | schemas.HeadsAttention,
    response_description="The map, in the form that was asked for",
    responses={200: {"content": docs.MAP_BODIES}, **docs.ATTENTION_PROBLEMS},
    openapi_extra=docs.ONE_IMAGE,
)
async def attention(request: Request, options: Annotated[schemas.AttentionOptions, Query()]) -> Response:
    """A map over the image's patches, as numbers (json, npy) or drawn over the tile (png)."""
    service, trace = find_service(request), find_trace(request)
    options = options.model_copy(update={"method": choose_method(options, service.manifest.maps.default)})
    service.let_in(options)
    media_type = choose_type([JSON, PNG, NPY], options.format, read_accept(request))
    with trace.measure("upload"):
        upload = await read_image(request)
    async with attended(request, service.deadline_s):
        sample, prediction, drawable = await service.explain(upload.data, trace, options)
        if media_type == PNG:
            caption = write_caption(drawable, prediction)
            body = await service.render(lambda: draw(drawable, sample, caption, options), trace)
        elif media_type == NPY:
            body = write_npy(drawable.grid)
        else:
            body = describe_attention(drawable, sample, prediction).model_dump_json().encode()
    return Response(body, media_type=media_type, headers={"Vary": "Accept"})


def draw(drawable: Drawable, sample: Sample, caption: str, options: schemas.AttentionOptions) -> bytes:
    if drawable.grid.ndim == 4:
        return draw_heads(
            sample.tile.pixels,
            drawable.grid,
            caption=caption,
            colormap=options.colormap,
            alpha=options.alpha,
            upsample=options.upsample,
            tile_mpp=sample.tile.mpp,
        )
    return draw_overlay(
        sample.tile.pixels,
        drawable.grid,
        caption=caption,
        signed=drawable.signed,
        uniform_level=drawable.uniform_level,
        colormap=options.colormap,
        alpha=options.alpha,
        upsample=options.upsample,
        tile_mpp=sample.tile.mpp,
        quantity=drawable.quantity,
    )


@router.post(
    "/features",
    tags=["Images"],
    summary="Give the numbers behind a prediction",
    response_model=schemas.Features,
    response_description="The features",
    responses={200: {"content": docs.FEATURE_BODIES}, **docs.FEATURE_PROBLEMS},
    openapi_extra=docs.ONE_IMAGE,
)
async def features(request: Request, options: Annotated[schemas.FeatureOptions, Query()]) -> Response:
    """What the model's last layer read, for clustering or for a classifier of one's own."""
    service, trace = find_service(request), find_trace(request)
    service.let_in(options)
    media_type = choose_type([JSON, NPY], options.format, read_accept(request))
    with trace.measure("upload"):
        upload = await read_image(request)
    async with attended(request, service.deadline_s):
        sample, row = await service.features(upload.data, trace, options)
    if media_type == NPY:
        return Response(write_npy(row), media_type=NPY, headers={"Vary": "Accept"})
    answer = schemas.Features(features=row.tolist(), input=describe_input(sample), model=service.model)
    return Response(answer.model_dump_json(), media_type=JSON, headers={"Vary": "Accept"})


def read_accept(request: Request) -> str:
    return ",".join(request.headers.getlist("accept"))  # in as many lines as the client likes


def write_npy(array: NDArray[np.float32]) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, np.ascontiguousarray(array, np.float32))
    return buffer.getvalue()


@router.head("/model", include_in_schema=False)
@router.get("/model", tags=["Model"], summary="Show the model card", responses=docs.CARD_PROBLEMS)
async def model(request: Request) -> schemas.ModelCard:
    """Classes, scale, every measured figure with its protocol, limits, licences, and where the model runs."""
    service = find_service(request)
    settings = service.settings
    limits = schemas.ServiceLimits(
        version=request.app.version,
        max_images=MAX_IMAGES,
        max_body_bytes=settings.max_body_bytes,
        max_megapixels=settings.max_megapixels,
        max_queue=settings.max_queue,
        deadline_ms=settings.deadline_ms,
    )
    card = service.manifest.model_dump(mode="json") | service.model.model_dump()
    return schemas.ModelCard.model_validate({**card, "service": limits})


@router.head("/healthz", include_in_schema=False)
@router.get("/healthz", tags=["Operation"], summary="Is the process alive?")
async def healthz() -> schemas.Health:
    return schemas.Health()


@router.head("/readyz", include_in_schema=False)
@router.get("/readyz", tags=["Operation"], summary="Can it answer?", responses=docs.READY_PROBLEMS)
async def readyz(request: Request) -> schemas.Readiness:
    """Whether the model answers on its device; 503 from the moment the service is told to stop."""
    service = find_service(request)
    await service.check_device()
    shown = service.model
    return schemas.Readiness(device=shown.device, precision=shown.precision, digest=shown.digest)


@router.head("/metrics", include_in_schema=False)
@router.get(
    "/metrics",
    tags=["Operation"],
    summary="Figures for Prometheus",
    response_class=Response,
    responses={200: {"content": {"text/plain": {"schema": {"type": "string"}}}}, **docs.CARD_PROBLEMS},
)
async def metrics(request: Request) -> Response:
    numbers: Metrics = request.app.state.metrics
    return Response(numbers.expose(), headers={"Content-Type": CONTENT_TYPE})


@router.api_route("/", methods=["GET", "HEAD"], include_in_schema=False)
async def show_page() -> FileResponse:
    return FileResponse(WEB / "index.html", headers={"Content-Security-Policy": PEOPLE_POLICY})


@router.api_route("/docs", methods=["GET", "HEAD"], include_in_schema=False)
async def show_docs() -> FileResponse:
    return FileResponse(WEB / "docs.html", headers={"Content-Security-Policy": DOCS_POLICY})


@router.api_route("/redoc", methods=["GET", "HEAD"], include_in_schema=False)
async def show_redoc() -> FileResponse:
    return FileResponse(WEB / "redoc.html", headers={"Content-Security-Policy": DOCS_POLICY})
