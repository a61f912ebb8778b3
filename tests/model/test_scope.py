import numpy as np
import pytest

from model.artifact import CorruptArtifact, Gate
from model.quality import PALETTE_SIZE, Quality
from model.scope import Cloud, Reference, judge, read_reference, write_reference

GATE = Gate(
    min_tissue_share=0.3,
    min_sharpness=50,
    min_confidence=0.6,
    min_brightness=40,
    max_brightness=200,
    max_odd_share=0.05,
    max_blue_absorption=0.9,
    max_foreign_share=0.02,
    max_distance=1.5,
    protocol="none",
)
USUAL = {
    "tissue_share": 0.9,
    "sharpness": 400.0,
    "brightness": 120.0,
    "odd_share": 0.0,
    "blue_absorption": 0.6,
    "foreign_share": 0.0,
    "distance": 1.0,
    "confidence": 0.9,
}


def ask(gate=GATE, **changed):
    values = USUAL | changed
    distance, confidence = values.pop("distance"), values.pop("confidence")
    doubts, verdict = judge(Quality(**values), distance, confidence, gate)
    assert all(doubt.text.endswith(".") for doubt in doubts)
    return verdict, [doubt.code for doubt in doubts]


@pytest.mark.parametrize(
    ("changed", "verdict", "codes"),
    [
        ({}, "ok", []),
        ({"tissue_share": 0.3, "sharpness": 50, "confidence": 0.6, "distance": 1.5}, "ok", []),
        ({"confidence": 0.5}, "uncertain", ["low_confidence"]),
        ({"sharpness": 20}, "uncertain", ["blurred"]),
        ({"sharpness": 20, "confidence": 0.5}, "uncertain", ["low_confidence", "blurred"]),
        ({"brightness": 20}, "uncertain", ["too_dark"]),
        ({"brightness": 230}, "uncertain", ["too_bright"]),
        ({"tissue_share": 0.1}, "out_of_scope", ["little_tissue"]),
        ({"odd_share": 0.2}, "out_of_scope", ["foreign_stain"]),
        ({"blue_absorption": 1.1}, "out_of_scope", ["unusual_hue"]),
        ({"foreign_share": 0.5}, "out_of_scope", ["unusual_colours"]),
        ({"distance": 3}, "uncertain", ["unlike_training"]),
        ({"tissue_share": 0.1, "confidence": 0.5}, "out_of_scope", ["little_tissue", "low_confidence"]),
    ],
)
def test_the_verdict_follows_from_the_limits(changed, verdict, codes):
    assert ask(**changed) == (verdict, codes)


@pytest.mark.parametrize("name", USUAL)
def test_a_number_that_is_none_is_never_ok(name):
    assert ask(**{name: float("nan")})[0] != "ok"


def test_an_older_artefact_judges_by_the_limits_it_has():
    old = Gate(min_tissue_share=0.3, min_sharpness=50, min_confidence=0.6, protocol="none")
    assert ask(old, odd_share=1, blue_absorption=5, foreign_share=None, distance=None) == ("ok", [])
    assert ask(old, sharpness=0) == ("uncertain", ["blurred"])


@pytest.fixture
def reference():
    whitening = np.diag([1, 0.5]).astype(np.float32)  # the second direction spreads twice as far
    return Reference(np.arange(PALETTE_SIZE) % 2 == 0, Cloud(np.array([1, 2], np.float32), whitening))


def test_distance_counts_standard_deviations_over_all_directions(reference):
    found = reference.cloud.distance(np.array([[1, 2], [2, 2], [1, 4], [2, 4]], np.float32))
    assert found == pytest.approx([0, 0.5**0.5, 0.5**0.5, 1])


def test_a_reference_is_read_as_it_was_written(reference, tmp_path):
    write_reference(reference, tmp_path / "reference.npz")
    again = read_reference(tmp_path / "reference.npz", 2)
    assert np.array_equal(again.palette, reference.palette)
    assert np.array_equal(again.cloud.centre, reference.cloud.centre)
    assert np.array_equal(again.cloud.whitening, reference.cloud.whitening)


def test_a_reference_of_another_network_or_none_is_refused(reference, tmp_path):
    write_reference(reference, tmp_path / "reference.npz")
    with pytest.raises(CorruptArtifact, match=r"shapes .* the manifest means"):
        read_reference(tmp_path / "reference.npz", 3)
    (tmp_path / "reference.npz").write_bytes(b"something else")
    with pytest.raises(CorruptArtifact, match="no reference"):
        read_reference(tmp_path / "reference.npz", 2)


def test_a_damaged_reference_is_refused(reference, tmp_path):
    path = tmp_path / "reference.npz"
    write_reference(reference, path)
    whole = path.read_bytes()
    for damaged in (whole[:-1], whole.replace(b"centre.npy", b"center.npy", 1)):
        path.write_bytes(damaged)
        with pytest.raises(CorruptArtifact, match="no reference"):
            read_reference(path, 2)
    with path.open("wb") as file:
        np.save(file, reference.cloud.centre)
    with pytest.raises(CorruptArtifact, match="no reference"):
        read_reference(path, 2)


@pytest.mark.parametrize("centre", [np.array([1, np.nan]), np.array(["1", "2"]), np.array([None, None])])
def test_a_reference_of_other_things_than_numbers_is_refused(reference, tmp_path, centre):
    path = tmp_path / "reference.npz"
    np.savez(path, palette=reference.palette, centre=centre, whitening=reference.cloud.whitening)
    with pytest.raises(CorruptArtifact, match="no reference"):
        read_reference(path, 2)
