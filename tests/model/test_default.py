"""The artefact that is shipped."""

import numpy as np
import pytest

from app.settings import SHIPPED_ARTIFACT
from model.session import load_golden, open_classifier


@pytest.fixture(scope="module")
def shipped():
    return open_classifier(SHIPPED_ARTIFACT, device="cpu")


def test_it_knows_the_six_tissues_in_their_order(shipped):
    assert shipped.manifest.class_names == ["Tumor", "Stroma", "Complex", "Lympho", "Debris", "Mucosa"]
    assert (shipped.manifest.tile_px, shipped.manifest.tile_mpp, shipped.manifest.grid) == (150, 0.495, 10)


def test_its_figures_name_both_protocols_and_stand_beside_the_floors(shipped):
    protocols = {metric.protocol for metric in shipped.manifest.metrics}
    assert any("random folds" in p for p in protocols) and any("slides out" in p for p in protocols)
    names = {metric.name for metric in shipped.manifest.metrics}
    assert {"accuracy", "macro_f1", "ece", "accuracy of colour histogram, SVM"} <= names
    assert all(metric.low <= metric.value <= metric.high for metric in shipped.manifest.metrics)


def test_it_says_what_its_weights_may_be_used_for(shipped):
    assert "research" in shipped.manifest.weights_licence.lower()
    assert "may not be used commercially" in (SHIPPED_ARTIFACT / "LICENSE").read_text()
    assert all(source.licence for source in shipped.manifest.data)


def test_it_stays_small():
    assert sum(path.stat().st_size for path in SHIPPED_ARTIFACT.iterdir()) < 25 * 2**20


@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_every_variant_answers_the_golden_tile_here(precision):
    classifier = open_classifier(SHIPPED_ARTIFACT, device="cpu", precision=precision)
    found = classifier.predict(load_golden(SHIPPED_ARTIFACT, classifier.manifest)).probabilities[0]
    assert np.abs(found - classifier.manifest.golden.probabilities).max() < 0.1
