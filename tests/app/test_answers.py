import io

import numpy as np
import pytest
from PIL import Image

from app.answers import CoverageUnavailable, choose_set, compare_views, describe_prediction
from app.samples import take_sample
from app.schemas import Model
from model.artifact import Conformal, Gate, read_manifest

EVEN = np.full(6, 1 / 6, np.float32)
GATE = Gate(min_tissue_share=0.1, min_sharpness=1, min_confidence=0.6, max_distance=1.0, protocol="none")
MODEL = Model(name="x", version="1", digest="0", device="cpu", precision="fp32")


@pytest.fixture(scope="module")
def manifest(tiny_artifact):
    return read_manifest(tiny_artifact)


@pytest.fixture(scope="module")
def sample(manifest, png):
    return take_sample(png, manifest, None, 50)


def predict(sample, manifest, **changes):
    probabilities = np.array([[0.9, 0.1, 0, 0, 0, 0]], np.float32)
    return describe_prediction(sample, probabilities, manifest.model_copy(update=changes), MODEL, None, 1.25)


def test_reasons_and_numbers_of_the_gate_reach_the_answer(sample, manifest):
    usual = predict(sample, manifest)
    assert (usual.verdict, usual.reasons, usual.quality.distance) == ("ok", [], 1.25)
    strict = predict(sample, manifest, gate=GATE)
    assert strict.verdict == "uncertain" and [reason.code for reason in strict.reasons] == ["unlike_training"]


def test_a_distance_that_is_no_number_is_left_out_and_not_ok(sample, manifest):
    gated = manifest.model_copy(update={"gate": GATE})
    probabilities = np.array([[0.9, 0.1, 0, 0, 0, 0]], np.float32)
    answer = describe_prediction(sample, probabilities, gated, MODEL, None, float("nan"))
    assert answer.quality.distance is None and answer.verdict == "uncertain"


@pytest.mark.parametrize(("side_px", "mpp", "verdict"), [(742, None, "ok"), (743, None, "uncertain"), (743, 0.4, "ok")])
def test_a_field_too_large_for_a_tile_of_unknown_scale_is_not_ok(manifest, png, side_px, mpp, verdict):
    field = io.BytesIO()
    Image.open(io.BytesIO(png)).resize((side_px + 9, side_px)).save(field, "PNG")
    anything = Gate(min_tissue_share=0, min_sharpness=0, min_confidence=0, protocol="none")
    answer = predict(take_sample(field.getvalue(), manifest, mpp, 50), manifest, gate=anything)
    assert answer.verdict == verdict
    assert [reason.code for reason in answer.reasons] == ["implausible_scale"] * (verdict != "ok")


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
    with pytest.raises(CoverageUnavailable, match=r"only 0\.8, 0\.95; the 100 tiles .* at most 0\.990"):
        choose_set(EVEN, with_sets(manifest), 0.9)
    assert choose_set(EVEN, manifest, None) is None
    with pytest.raises(CoverageUnavailable, match="leave out"):
        choose_set(EVEN, manifest, 0.9)


def test_views_that_disagree():
    views = np.array([[0.9, 0.1], [0.9, 0.1], [0.9, 0.1], [0.1, 0.9]], np.float32)
    found = compare_views(views, top=0)
    assert (found.views, found.disagreement) == (4, 0.25)
    assert found.spread == pytest.approx(np.std([0.9, 0.9, 0.9, 0.1]), abs=1e-6)
