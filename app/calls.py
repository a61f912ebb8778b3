"""What a thread that calls the model does with what the batcher hands it: questions as they are, small pictures whole.

The batcher's threads run all of this. The event loop only makes the questions and errands, and sets `is_wanted`.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, TypeVar, cast

import numpy as np
from numpy.typing import NDArray

from app.samples import Sample
from app.trace import Trace
from model.pixels import ImageRefused
from model.session import Classifier, Predictions

Graph = Literal["predict", "explain"]
Work = Literal[Graph, "errand"]
ObserveCall = Callable[[Graph, int, float], None]  # of which graph, with how many tiles, in how many seconds
T = TypeVar("T")

# How many errands a thread takes at once when many wait: their reading then finds its code in the caches, which every
# model call empties.
ERRANDS = 8


class SenderGone(Exception):
    pass


@dataclass(frozen=True, slots=True)
class Question:
    """One tile for the model, and for the explain graph the patches that it may see."""

    pixels: NDArray[np.uint8]  # (S, S, 3)
    keep: NDArray[np.bool_] | None = None  # (G*G,)


@dataclass(slots=True)
class Errand:
    """A small picture, which the thread that calls the model reads as well, and answers for."""

    read: Callable[[], Sample]
    answer: Callable[[Sample, list[Predictions]], Any]
    trace: Trace  # of its own: the thread must not write into one that others use
    is_wanted: bool = True  # False once its sender has gone

    def check_wanted(self) -> None:
        if not self.is_wanted:
            raise SenderGone


Item = Question | Errand


def answer_questions(
    classifier: Classifier, observe_call: ObserveCall
) -> Callable[[Work, list[Item], bool], Sequence[Any]]:
    """The batcher's `run`: one model call, or one for each errand."""

    def run(work: Work, items: list[Item], alone: bool) -> Sequence[Any]:
        if work == "errand":
            return run_errands(classifier, observe_call, cast(list[Errand], items), alone)
        questions = cast(list[Question], items)  # the batcher never mixes kinds of work
        tiles = questions[0].pixels[None] if len(questions) == 1 else np.stack([q.pixels for q in questions])
        with observing(observe_call, work, len(tiles)):
            if work == "predict":
                return split(classifier.predict(tiles, alone=alone))
            return split(classifier.explain(tiles, gather_keeps(questions, classifier.manifest.grid)))

    return run


@contextmanager
def observing(observe_call: ObserveCall, graph: Graph, tiles: int) -> Iterator[None]:
    """A call that fails isn't counted."""
    started_at = time.monotonic()
    yield
    observe_call(graph, tiles, time.monotonic() - started_at)


def run_errands(classifier: Classifier, observe_call: ObserveCall, errands: list[Errand], alone: bool) -> list[Any]:
    """The model gets one at a time, so that no answer depends on its neighbours; nor does any fail with them."""

    def read(errand: Errand) -> Sample:
        errand.check_wanted()
        with errand.trace.measure("decode"):
            return errand.read()

    def ask(errand: Errand, sample: Sample) -> Predictions:
        errand.check_wanted()
        with errand.trace.measure("infer"), observing(observe_call, "predict", 1):
            return classifier.predict(sample.tile.pixels[None], alone=alone)

    def answer(errand: Errand, sample: Sample, predictions: Predictions) -> Any:
        errand.check_wanted()  # or an answer that nobody had would count among the predictions given
        return errand.answer(sample, [predictions])

    samples = [attempt(read, errand) for errand in errands]
    predictions = [attempt(ask, *given) for given in zip(errands, samples, strict=True)]
    return [attempt(answer, *given) for given in zip(errands, samples, predictions, strict=True)]


def attempt(step: Callable[..., T], *given: Any) -> T | Exception:
    """What the step gives or raises; where an earlier one has raised, that."""
    for one in given:
        if isinstance(one, Exception):
            return one
    try:
        return step(*given)
    except (ImageRefused, SenderGone) as usual:
        # Where it was raised tells nobody anything, and would keep the pictures of all until the garbage is collected.
        return usual.with_traceback(None)
    except Exception as error:  # whatever it is, it belongs to one of several senders
        return error


def gather_keeps(questions: list[Question], grid: int) -> NDArray[np.bool_]:
    everything = np.ones(grid * grid, bool)
    return np.stack([everything if question.keep is None else question.keep for question in questions])


def split(answers: Predictions) -> list[Predictions]:
    """One answer a tile, each still with its leading dimension."""
    count = len(answers.logits)
    if count == 1:
        return [answers]
    return [type(answers)(**{name: value[n : n + 1] for name, value in vars(answers).items()}) for n in range(count)]
