import pytest

from model.artifact import Metric, read_manifest
from training.findings import CHANCE_ERROR
from training.report import render_card, table, write_card


@pytest.fixture
def manifest(tiny_artifact):
    metrics = [
        Metric(name="accuracy", value=0.8, low=0.7, high=0.9, n=100, protocol="random folds"),
        Metric(name="accuracy", value=0.6, low=0.4, high=0.8, n=10, protocol="by slide"),
    ]
    return read_manifest(tiny_artifact).model_copy(update={"metrics": metrics})


def test_every_number_stands_under_its_protocol_with_interval_and_n(manifest):
    card = render_card(manifest)
    by_protocol = card.split("### ")
    assert "| accuracy | 0.800 [0.700, 0.900] | 100 |" in by_protocol[1] and by_protocol[1].startswith("random folds")
    assert "| accuracy | 0.600 [0.400, 0.800] | 10 |" in by_protocol[2] and by_protocol[2].startswith("by slide")


def test_classes_use_variants_and_versions_are_told(manifest):
    card = render_card(manifest)
    assert all(f"| {c.name} | {c.description} |" in card for c in manifest.classes)
    assert manifest.intended_use in card and "| int8 |" in card and "| torch |" in card
    assert "it doesn't add up to the logit" in card


def test_limits_stand_in_a_table_as_far_as_there_are_any(manifest):
    card = render_card(manifest)
    assert "| share of the tile that is tissue | at least 0.2 | out of scope |" in card
    assert "distance of the features" in card and "absorption of blue" not in card


def test_the_calibration_error_of_chance_is_explained_where_it_is_told(manifest):
    chance = Metric(name=CHANCE_ERROR, value=0.055, low=0.02, high=0.1, n=179, protocol="random folds")
    told = render_card(manifest.model_copy(update={"metrics": [chance]}))
    assert f"| {CHANCE_ERROR} | 0.055 [0.020, 0.100] | 179 |" in told and "by chance alone" in told
    assert "by chance alone" not in render_card(manifest)


def test_a_network_that_nobody_tested_says_so(manifest):
    assert "nothing is known" in render_card(manifest.model_copy(update={"metrics": []}))


def test_a_network_without_tokens_is_not_said_to_attend(manifest):
    maps = manifest.maps.model_copy(update={"methods": ["evidence", "occlusion"], "evidence": "exact"})
    card = render_card(manifest.model_copy(update={"maps": maps}))
    assert "it has evidence and occlusion" in card and "routed" not in card


def test_a_bar_in_a_text_does_not_break_the_table():
    assert table(["a"], [["x|y"]]).splitlines()[-1] == "| x\\|y |"


def test_the_card_is_written_where_it_is_wanted(manifest, tmp_path):
    write_card(manifest, tmp_path / "docs" / "card.md")
    assert (tmp_path / "docs" / "card.md").read_text() == render_card(manifest)
