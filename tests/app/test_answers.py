import numpy as np
import pytest

from app.answers import CoverageUnavailable, choose_set, compare_views, judge
from app.samples import Sample, take_sample
from model.artifact import Conformal, Gate, read_manifest

EVEN = np.full(6, 1 / 6, np.float32)
GATE = Gate(min_tissue_share=0.3, min_sharpness=50, min_confidence=0.6, protocol="none")


@pytest.fixture(scope="module")
def manifest(tiny_artifact):
    return read_manifest(tiny_artifact)


@pytest.fixture(scope="module")
def sample(manifest, png):
    return take_sample(png, manifest, None, 50)


def change(sample: Sample, **values) -> Sample:
    return Sample(**({name: getattr(sample, name) for name in Sample.__slots__} | values))


@pytest.mark.parametrize(
    ("tissue_share", "sharpness", "confidence", "verdict", "codes"),
    [
        (0.9, 400, 0.9, "ok", []),
        (0.3, 50, 0.6, "ok", []),
        (0.9, 400, 0.5, "uncertain", ["low_confidence"]),
        (0.9, 20, 0.9, "uncertain", ["blurred"]),
        (0.9, 20, 0.5, "uncertain", ["low_confidence", "blurred"]),
        (0.1, 400, 0.9, "out_of_scope", ["little_tissue"]),
        (0.1, 20, 0.5, "out_of_scope", ["little_tissue", "low_confidence", "blurred"]),
    ],
)
def test_the_verdict_follows_from_quality_and_confidence(sample, tissue_share, sharpness, confidence, verdict, codes):
    reasons, found = judge(change(sample, tissue_share=tissue_share, sharpness=sharpness), confidence, GATE)
    assert found == verdict
    assert [reason.code for reason in reasons] == codes
    assert all(reason.text.endswith(".") for reason in reasons)


def with_sets(manifest):
    conformal = Conformal(
        coverages=[0.8, 0.95],
        thresholds=[[0.5] * 6, [0.9, 0.9, 0.9, 0.99, 0.9, 0.9]],
        default=0.95,
        n=100,
        protocol="none",
    )
    return manifest.model_copy(update={"conformal": conformal})


def test_prediction_sets_hold_what_cannot_be_ruled_out(manifest):
    probabilities = np.array([0.3, 0.45, 0.12, 0.02, 0.06, 0.05], np.float32)
    wide = choose_set(probabilities, with_sets(manifest), None)
    assert wide is not None and (wide.labels, wide.coverage) == (["Stroma", "Tumor", "Complex", "Lympho"], 0.95)
    narrow = choose_set(probabilities, with_sets(manifest), 0.8)
    assert narrow is not None and narrow.labels == ["Stroma"]  # the top class, though below its threshold


def test_other_coverages_are_refused_with_those_there_are(manifest):
    with pytest.raises(CoverageUnavailable, match=r"only 0\.8, 0\.95"):
        choose_set(EVEN, with_sets(manifest), 0.9)
    assert choose_set(EVEN, manifest, None) is None
    with pytest.raises(CoverageUnavailable, match="leave out"):
        choose_set(EVEN, manifest, 0.9)


def test_views_that_disagree():
    views = np.array([[0.9, 0.1], [0.9, 0.1], [0.9, 0.1], [0.1, 0.9]], np.float32)
    found = compare_views(views, top=0)
    assert (found.views, found.disagreement) == (4, 0.25)
    assert found.spread == pytest.approx(np.std([0.9, 0.9, 0.9, 0.1]), abs=1e-6)
