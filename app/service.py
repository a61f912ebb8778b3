"""What the service does with one uploaded image: prepare it, ask the model, put the answer together.

bytes --take_sample--> Sample --batcher--> Predictions | Explanations --answers--> document | picture
"""

import asyncio
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from app import maps, schemas
from app.answers import describe_model, describe_prediction, find_thresholds
from app.batcher import Batcher, CallFailed, Reservation
from app.calls import Errand, Graph, Item, Question, Work
from app.decoders import Decoders
from app.maps import Drawable
from app.metrics import Metrics
from app.samples import SMALL_BYTES, Sample, take_sample
from app.schemas import AttentionOptions, FeatureOptions, PredictOptions
from app.settings import Settings
from app.trace import Trace
from app.views import VIEWS, look_from, merge_views
from model.occlusion import cut_groups, mask_groups
from model.pixels import ImageTooLarge, check_mpp
from model.session import Classifier, Explanations, Predictions

T = TypeVar("T")

# A picture of at most SMALL_BYTES and SMALL_MEGAPIXELS is read by the thread that then calls the model: handing it over
# costs more than reading it, which takes less than a model call, or two of a hostile one. One whose header shows more
# pixels queues again, for the decoders.
SMALL_MEGAPIXELS = 0.3

PROBE_EVERY_S = 10  # a model call as recent as this shows that the device works
PROBE_WITHIN_S = 5


class NotReady(RuntimeError):
    retry_after_s = 5


class Service:
    def __init__(
        self,
        settings: Settings,
        classifier: Classifier,
        batcher: Batcher[Work, Item, Any],
        decoders: Decoders,
        metrics: Metrics,
    ) -> None:
        self.settings = settings
        self.classifier = classifier
        self.manifest = classifier.manifest
        self.model = describe_model(classifier, classifier.precision)
        self._explaining_model = describe_model(classifier, classifier.explain_precision)
        self.deadline_s = settings.deadline_ms / 1000
        self._small_megapixels = min(SMALL_MEGAPIXELS, settings.max_megapixels)
        self.batcher = batcher
        # Beside a GPU call there are cores to read with, and a batch must not wait for one of its pictures.
        self._runs_errands = classifier.device == "cpu" and batcher.limits["predict"] == 1
        self._palette = classifier.reference.palette if classifier.reference else None
        self._decoders = decoders
        self._metrics = metrics

    def let_in(self, options: PredictOptions | FeatureOptions) -> None:
        """Before a body is read: refusing must cost next to nothing, or a crowd would keep the service busy with it."""
        if options.mpp is not None:
            check_mpp(options.mpp)
        if isinstance(options, PredictOptions):
            find_thresholds(self.manifest, options.coverage)
        if isinstance(options, AttentionOptions):
            maps.check_options(options, self.manifest)
        self.batcher.check_open()
        self.batcher.check_room(count_places(options), self.deadline_s)

    async def predict(self, data: bytes, trace: Trace, options: PredictOptions) -> schemas.Prediction:
        def describe(sample: Sample, answers: list[Predictions]) -> schemas.Prediction:
            return self._describe(sample, answers, options.coverage)

        return await self._predict(data, trace, options, describe)

    async def features(self, data: bytes, trace: Trace, options: FeatureOptions) -> tuple[Sample, NDArray[np.float32]]:
        return await self._predict(data, trace, options, lambda sample, answers: (sample, answers[0].features[0]))

    async def explain(
        self, data: bytes, trace: Trace, options: AttentionOptions
    ) -> tuple[Sample, schemas.Prediction, Drawable]:
        """`options` are those that were let in."""
        sample = await self._take_sample(data, options, trace)
        with self._reserve(count_places(options)) as reservation:
            views = await self._ask("explain", list_views(sample, count_views(options)), reservation, trace)
            prediction = self._describe(sample, views, options.coverage)
            explanations = merge_views([view for view in views if isinstance(view, Explanations)])
            drawable = await self._draw_map(sample, explanations, options, prediction.label, reservation, trace)
        return sample, prediction, drawable

    async def render(self, draw: Callable[[], bytes], trace: Trace) -> bytes:
        with trace.measure("render"):
            return await self._decoders.run(draw)

    async def check_device(self) -> None:
        """Raises unless the model answered lately, or answers now."""
        self.batcher.check_open()
        if time.monotonic() - self.batcher.last_success < PROBE_EVERY_S:
            return
        side = self.manifest.tile_px
        blank = Question(np.full((side, side, 3), 255, np.uint8))
        try:
            async with asyncio.timeout(PROBE_WITHIN_S):
                with self.batcher.reserve(1) as reservation:
                    await self.batcher.submit(reservation, "predict", [blank])
        except TimeoutError:
            raise NotReady(f"the model did not answer within {PROBE_WITHIN_S} s") from None
        except CallFailed as error:
            raise NotReady("the model fails; the log of the requests that met it has the cause") from error

    async def _draw_map(
        self,
        sample: Sample,
        explanations: Explanations,
        options: AttentionOptions,
        label: str,
        reservation: Reservation,
        trace: Trace,
    ) -> Drawable:
        names = self.manifest.class_names
        target = maps.find_class(names, options.target or label)
        if options.method == "occlusion":
            groups = cut_groups(self.manifest.grid, options.masks)
            questions = [Question(sample.tile.pixels, keep) for keep in mask_groups(groups)]
            masked = await self._ask("explain", questions, reservation, trace)
            return maps.read_occlusion(explanations, masked, groups, names, target)
        if options.method == "evidence":
            return maps.read_evidence(explanations, names, target)
        if options.method == "rollout":
            return maps.read_rollout(explanations, self.manifest.attended_share)
        if options.layout == "heads":
            return maps.read_heads(explanations, self.manifest.attended_share)
        return maps.read_attention(explanations, options.layer, options.head, self.manifest.attended_share)

    @contextmanager
    def _reserve(self, places: int) -> Iterator[Reservation]:
        try:
            with self.batcher.reserve(places, self.deadline_s) as reservation:
                self._metrics.waiting.set(self.batcher.waiting)
                yield reservation
        finally:
            self._metrics.waiting.set(self.batcher.waiting)

    async def _predict(
        self,
        data: bytes,
        trace: Trace,
        options: PredictOptions | FeatureOptions,
        answer: Callable[[Sample, list[Predictions]], T],
    ) -> T:
        views = count_views(options)
        if self._runs_errands and views == 1 and len(data) <= SMALL_BYTES:
            # With more pixels than its bytes promised it comes back unread, and goes the way of the large ones.
            with suppress(ImageTooLarge):
                return await self._send(data, trace, options.mpp, answer)
        sample = await self._take_sample(data, options, trace)
        with self._reserve(views) as reservation:
            return answer(sample, await self._ask("predict", list_views(sample, views), reservation, trace))

    async def _send(
        self, data: bytes, trace: Trace, mpp: float | None, answer: Callable[[Sample, list[Predictions]], T]
    ) -> T:
        errand = Errand(lambda: self._read(data, mpp, self._small_megapixels), answer, Trace(trace.request_id))
        with self._reserve(1) as reservation:
            try:
                outcome = await self.batcher.submit(reservation, "errand", [errand])
                own_s = sum(errand.trace.stages_s.values())
                trace.add(
                    "queue", outcome.queue_s + outcome.infer_s - own_s
                )  # including other errands of the same call
            finally:
                errand.is_wanted = False
                for stage, seconds in dict(errand.trace.stages_s).items():  # after a hang-up it is still being written
                    trace.add(stage, seconds)
        answered: T = outcome.results[0]
        return answered

    async def _take_sample(self, data: bytes, options: PredictOptions | FeatureOptions, trace: Trace) -> Sample:
        """Checks first that the model has room, but reserves none: others would be refused it while this is read."""
        self.batcher.check_room(count_places(options), self.deadline_s)
        with trace.measure("decode"):
            try:
                return await self._decoders.run(partial(self._read, data, options.mpp, self._small_megapixels))
            except ImageTooLarge as refusal:
                megapixels = refusal.megapixels
            limit = self.settings.max_megapixels
            read = partial(self._read, data, options.mpp, limit)
            if megapixels > limit:  # refusing it takes no time
                return await self._decoders.run(read)
            return await self._decoders.read_large(read, megapixels, self.deadline_s)

    def _read(self, data: bytes, mpp: float | None, max_megapixels: float) -> Sample:
        return take_sample(data, self.manifest, mpp, max_megapixels, self._palette)

    async def _ask(
        self, graph: Graph, questions: list[Question], reservation: Reservation, trace: Trace
    ) -> list[Predictions]:
        answer = await self.batcher.submit(reservation, graph, questions)
        trace.add("queue", answer.queue_s)
        trace.add("infer", answer.infer_s)
        return answer.results

    def _describe(self, sample: Sample, answers: list[Predictions], coverage: float | None) -> schemas.Prediction:
        probabilities = np.concatenate([answer.probabilities for answer in answers])  # (V, K)
        # Of the tile as it came, not of its views: the limit was fitted on tiles as they came.
        reference = self.classifier.reference
        distance = float(reference.cloud.distance(answers[0].features)[0]) if reference else None
        model = self._explaining_model if isinstance(answers[0], Explanations) else self.model
        prediction = describe_prediction(sample, probabilities, self.manifest, model, coverage, distance)
        self._metrics.verdicts.labels(prediction.label, prediction.verdict).inc()
        return prediction


def list_views(sample: Sample, views: int) -> list[Question]:
    pixels = sample.tile.pixels
    return [Question(look_from(pixels, view) if view else pixels) for view in range(views)]


def count_views(options: PredictOptions | FeatureOptions) -> int:
    return VIEWS if isinstance(options, PredictOptions) and options.tta else 1


def count_places(options: PredictOptions | FeatureOptions) -> int:
    """How often the model is asked."""
    masks = options.masks if isinstance(options, AttentionOptions) and options.method == "occlusion" else 0
    return count_views(options) + masks
