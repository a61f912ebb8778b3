"""What the routes' tests can't time: pictures that are taken on together."""

import io
from collections.abc import Callable
from typing import Any

import pytest
from PIL import Image

from app.calls import Errand, SenderGone, run_errands
from app.samples import SMALL_BYTES, Sample, take_sample
from app.service import SMALL_MEGAPIXELS
from app.trace import Trace
from model.pixels import ImageRefused, ImageTooLarge
from model.session import Classifier, Predictions, open_classifier
from tests.app.conftest import encode
from training.synthetic import draw_tile


@pytest.fixture(scope="module")
def classifier(tiny_artifact) -> Classifier:
    return open_classifier(tiny_artifact, "cpu")


@pytest.fixture(scope="module")
def pictures() -> list[bytes]:
    return [encode(draw_tile("Tumor", seed)) for seed in range(4)]


def keep_logits(sample: Sample, answers: list[Predictions]) -> tuple[str, bytes]:
    return sample.sha256, answers[0].logits.tobytes()


def overlook(graph: str, tiles: int, seconds: float) -> None: ...


def fail(*given: Any) -> Any:
    raise ArithmeticError


Answer = Callable[[Sample, list[Predictions]], Any]


def make_errand(classifier: Classifier, data: bytes, answer: Answer = keep_logits) -> Errand:
    return Errand(lambda: take_sample(data, classifier.manifest, None, SMALL_MEGAPIXELS), answer, Trace("x"))


def test_errands_run_together_answer_as_each_alone_and_fail_alone(classifier, pictures):
    alone = [
        run_errands(classifier, overlook, [make_errand(classifier, picture)], alone=False)[0] for picture in pictures
    ]
    together = [make_errand(classifier, picture) for picture in pictures]
    together[1:1] = [make_errand(classifier, b"no picture"), make_errand(classifier, pictures[0], fail)]
    calls: list[tuple[str, int]] = []

    def note(graph: str, tiles: int, seconds: float) -> None:
        calls.append((graph, tiles))

    first, refused, failed, *others = run_errands(classifier, note, together, alone=False)
    assert [first, *others] == alone
    assert isinstance(refused, ImageRefused) and isinstance(failed, ArithmeticError)
    assert calls == [("predict", 1)] * 5
    assert [list(errand.trace.stages_s) for errand in together[:2]] == [["decode", "infer"], ["decode"]]


def test_an_errand_whose_sender_has_gone_costs_no_call(classifier, pictures):
    errands = [make_errand(classifier, picture) for picture in pictures]
    errands[0].is_wanted = False
    calls = 0

    def take_away(graph: str, tiles: int, seconds: float) -> None:
        nonlocal calls
        calls += 1
        errands[2].is_wanted = False

    first, second, third, fourth = run_errands(classifier, take_away, errands, alone=False)
    assert isinstance(first, SenderGone) and isinstance(third, SenderGone)
    assert second[0] != fourth[0]
    assert calls == 2


def test_a_small_file_that_takes_long_to_read_is_no_errand(classifier):
    """It comes back after its header, and is read where no model call waits for it."""
    buffer = io.BytesIO()
    Image.new("RGB", (1000, 1000), "pink").save(buffer, "JPEG", progressive=True)
    assert len(buffer.getvalue()) < SMALL_BYTES
    errands = [make_errand(classifier, buffer.getvalue())]
    assert isinstance(run_errands(classifier, overlook, errands, alone=True)[0], ImageTooLarge)
