"""What Prometheus sees of the service. With several worker processes the numbers add up over all of them."""

import os

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    disable_created_metrics,
    generate_latest,
)
from prometheus_client.multiprocess import MultiProcessCollector
from prometheus_client.platform_collector import PlatformCollector
from prometheus_client.process_collector import ProcessCollector

from app.trace import STAGES

# prometheus-client reads this variable when it is imported: the parent of several workers sets it before they start.
FOLDER_VARIABLE = "PROMETHEUS_MULTIPROC_DIR"
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300)


class Metrics:
    def __init__(self) -> None:
        disable_created_metrics()  # type: ignore[no-untyped-call]  # a second series per counter, which nobody asks for
        self._registry = registry = CollectorRegistry()
        self.requests = Counter(
            "tissue_requests", "Requests answered.", ["route", "method", "status"], registry=registry
        )
        self.request_seconds = Histogram(
            "tissue_request_seconds", "Time from request to answer.", ["route"], buckets=_SECONDS, registry=registry
        )
        self.in_progress = Gauge(
            "tissue_requests_in_progress", "Requests being answered.", registry=registry, multiprocess_mode="livesum"
        )
        self.problems = Counter(
            "tissue_problems", "Requests, or images of a batch, refused or failed.", ["code"], registry=registry
        )
        self.stage_seconds = Histogram(
            "tissue_stage_seconds",
            f"Time a request, or an image of a batch, spent in a stage: {', '.join(STAGES)}.",
            ["stage"],
            buckets=_SECONDS,
            registry=registry,
        )
        self.call_seconds = Histogram(
            "tissue_model_call_seconds",
            "Time of one model call.",
            ["graph"],
            buckets=_SECONDS,
            registry=registry,
        )
        self.call_tiles = Histogram(
            "tissue_model_call_tiles",
            "Tiles in one model call.",
            ["graph"],
            buckets=(1, 2, 4, 8, 16, 32, 64),
            registry=registry,
        )
        self.waiting = Gauge(
            "tissue_queue_tiles", "Tiles waiting for the model.", registry=registry, multiprocess_mode="livesum"
        )
        self.verdicts = Counter("tissue_verdicts", "Predictions given.", ["label", "verdict"], registry=registry)
        self.model = Gauge(
            "tissue_model_info",
            "1 for the model that is served.",
            ["name", "version", "digest", "device", "precision"],
            registry=registry,
            multiprocess_mode="max",
        )
        if FOLDER_VARIABLE not in os.environ:
            ProcessCollector(registry=registry)
            PlatformCollector(registry=registry)

    def observe_stages(self, stages_s: dict[str, float]) -> None:
        for stage, seconds in stages_s.items():
            self.stage_seconds.labels(stage).observe(seconds)

    def observe_call(self, graph: str, tiles: int, seconds: float) -> None:
        self.call_seconds.labels(graph).observe(seconds)
        self.call_tiles.labels(graph).observe(tiles)

    def expose(self) -> bytes:
        if FOLDER_VARIABLE not in os.environ:
            return generate_latest(self._registry)
        everybody = CollectorRegistry()
        MultiProcessCollector(everybody)  # type: ignore[no-untyped-call]
        return generate_latest(everybody)
