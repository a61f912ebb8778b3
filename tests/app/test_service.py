"""What the routes' tests can't time: pictures that are taken on together."""

from app.samples import Sample, take_sample
from app.service import Errand, run_errands
from app.trace import Trace
from model.pixels import ImageRefused
from model.session import Predictions, open_classifier
from tests.app.conftest import encode
from training.synthetic import draw_tile


def test_errands_run_together_answer_as_each_alone_and_fail_alone(tiny_artifact):
    classifier = open_classifier(tiny_artifact, "cpu")

    def make(data: bytes) -> Errand:
        return Errand(lambda: take_sample(data, classifier.manifest, None, 1.0), keep_logits, Trace("x"))

    def keep_logits(sample: Sample, answers: list[Predictions]) -> tuple[str, bytes]:
        if sample.sha256 == unlucky:
            raise ArithmeticError
        return sample.sha256, answers[0].logits.tobytes()

    pictures = [encode(draw_tile("Tumor", seed)) for seed in range(4)]
    unlucky = take_sample(pictures[3], classifier.manifest, None, 1.0).sha256
    alone = [run_errands(classifier, [make(picture)], alone=False) for picture in pictures[:3]]
    together = [make(data) for data in (pictures[0], b"no picture", pictures[3], *pictures[1:3])]
    first, refused, failed, *others = run_errands(classifier, together, alone=False)
    assert [[first], *([other] for other in others)] == alone
    assert isinstance(refused, ImageRefused) and isinstance(failed, ArithmeticError)
    assert [list(errand.trace.stages_s) for errand in together[:2]] == [["decode", "infer"], ["decode"]]
