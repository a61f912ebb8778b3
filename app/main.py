"""Puts the parts together: the application, its middleware, and the service behind it, made of the settings."""

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from functools import cache
from importlib.metadata import version
from typing import Any

import numpy as np
from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from fastapi.responses import Response
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.routing import Route
from starlette.staticfiles import StaticFiles

from app import docs, routes
from app.batcher import Batcher
from app.calls import ERRANDS, Item, Work, answer_questions
from app.decoders import Decoders
from app.errors import KINDS, respond
from app.metrics import Metrics
from app.middleware import STATIC, BodyLimit, KeyCheck, LastResort, SecurityHeaders, Tracing
from app.service import Service
from app.settings import Settings
from model.session import CUDA_BATCHES, Classifier, DeviceUnavailable, available_cores, open_classifier

log = logging.getLogger("tissue")

CUDA_BATCH = 32


def create_app(settings: Settings) -> FastAPI:
    metrics = Metrics()
    app = FastAPI(
        title="Tissue",
        version=version("tissue"),
        summary="Tells which tissue a small H&E image shows, how sure it is, and where it looked.",
        description=docs.DESCRIPTION,
        servers=[{"url": "."}],  # wherever this document was found: a proxy may have put a path in front
        generate_unique_id_function=lambda route: route.name,
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
        lifespan=open_service(settings, metrics),
        middleware=stack_middleware(settings, metrics, is_draining=lambda: app.state.service.batcher.is_refusing),
    )
    app.state.metrics = metrics
    app.include_router(routes.router)
    app.mount(STATIC.rstrip("/"), StaticFiles(directory=routes.WEB))
    for error in (HTTPException, RequestValidationError, *KINDS):
        if error is not Exception:  # left to the last resort, which is outside of Starlette's handlers
            app.add_exception_handler(error, answer_error)
    app.openapi = cache(lambda: docs.write_openapi(app, has_keys=bool(settings.read_keys())))  # type: ignore[method-assign]
    return app


async def answer_error(request: Request, error: Exception) -> Response:
    return respond(error, request.scope)


def stack_middleware(settings: Settings, metrics: Metrics, is_draining: Callable[[], bool]) -> list[Middleware]:
    """From the outside in."""
    keys = settings.read_keys()
    stack = [
        Middleware(SecurityHeaders),
        Middleware(Tracing, metrics=metrics, is_draining=is_draining, paths=list_paths()),
    ]
    if settings.cors_origins:
        stack.append(
            Middleware(
                CORSMiddleware,
                allow_origins=settings.cors_origins,
                allow_methods=["GET", "POST"],
                allow_headers=["*"],
                expose_headers=["X-Request-ID", "Server-Timing", "Retry-After"],
            )
        )
    stack.append(Middleware(LastResort, respond=respond))  # within CORS: a page elsewhere must be able to read it
    if keys:
        stack.append(Middleware(KeyCheck, keys=keys, respond=respond))
    stack.append(Middleware(BodyLimit, max_bytes=settings.max_body_bytes))
    return stack


def list_paths() -> frozenset[str]:
    """Of the routes, and of the document that FastAPI makes of them."""
    return frozenset(route.path for route in routes.router.routes if isinstance(route, Route)) | {"/openapi.json"}


def open_service(settings: Settings, metrics: Metrics) -> Callable[[FastAPI], AbstractAsyncContextManager[None]]:
    """The application's lifespan: a verified, warm classifier behind a batcher."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        cores = max(1, available_cores() // settings.workers)
        classifier = await asyncio.to_thread(
            open_classifier,
            settings.artifact,
            settings.device,
            settings.precision,
            settings.intra_threads or cores,
        )
        max_batch = choose_max_batch(settings, classifier)
        await asyncio.to_thread(warm, classifier, max_batch)
        batcher: Batcher[Work, Item, Any] = Batcher(
            answer_questions(classifier, metrics.observe_call),
            threads=settings.infer_threads or (1 if classifier.device == "cuda" else cores),
            limits={"predict": max_batch, "explain": max_batch, "errand": ERRANDS},
            max_queue=settings.max_queue,
        )
        decoders = Decoders(settings.decode_threads or cores)
        app.state.service = service = Service(settings, classifier, batcher, decoders, metrics)
        shown = service.model
        await asyncio.to_thread(app.openapi)  # takes 0.1 s, in which its first reader would keep everybody waiting
        metrics.model.labels(shown.name, shown.version, shown.digest, shown.device, shown.precision).set(1)
        try:
            yield
        finally:
            batcher.refuse()
            batcher.close()
            decoders.close()

    return lifespan


def choose_max_batch(settings: Settings, classifier: Classifier) -> int:
    if classifier.precision == "int8":
        if settings.max_batch not in (None, 1):
            log.warning("TISSUE_MAX_BATCH is left alone: int8 takes one tile a call, whose scale others would change")
        return 1
    return settings.max_batch or (CUDA_BATCH if classifier.device == "cuda" else 1)


def warm(classifier: Classifier, max_batch: int) -> None:
    """Every batch size once, so that no request pays for the first call of its size."""
    side = classifier.manifest.tile_px
    for size in [size for size in CUDA_BATCHES if size < max_batch] + [max_batch]:
        tiles = np.full((size, side, side, 3), 255, np.uint8)
        try:
            classifier.predict(tiles, alone=True)
            classifier.predict(tiles, alone=False)
            classifier.explain(tiles)
        except Exception as error:  # a GPU that has room for the graphs, but not for so many tiles
            raise DeviceUnavailable(
                f"a batch of {size} fails on {classifier.device}: {error}. Set TISSUE_MAX_BATCH lower"
            ) from error
