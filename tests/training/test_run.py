import json

import numpy as np
import pytest

from model.artifact import TissueClass, read_manifest, verify_files
from model.session import open_classifier
from training.config import BadConfig, Card
from training.fit import read_tiles
from training.run import BESIDE_FOLDS, claim, complete, cross_validate_and_keep, export_run, fit_and_export


@pytest.fixture(scope="module")
def run(small_fit, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "small"
    return folder, fit_and_export(small_fit, folder)


def test_a_run_leaves_curves_and_an_artefact_that_verifies(run):
    folder, manifest = run
    assert {"config.json", "latest.pt", "curve.csv", "curve.png", "artifact"} <= {p.name for p in folder.iterdir()}
    assert read_manifest(folder / "artifact") == manifest
    verify_files(manifest, folder / "artifact")


def test_figures_name_protocol_and_n_and_stand_beside_the_floors(run):
    metrics = {metric.name: metric for metric in run[1].metrics}
    assert metrics["accuracy"].n == 6
    assert metrics["accuracy"].protocol == "one random fifth held out"
    assert metrics["accuracy"].low <= metrics["accuracy"].value <= metrics["accuracy"].high
    assert "accuracy of colour histogram, SVM" in metrics and "accuracy of mean colour, nearest mean" in metrics


def test_a_folder_belongs_to_one_config(run, small_fit):
    other = small_fit.model_copy(update={"split": "all"})
    with pytest.raises(BadConfig, match=r"holds a run with other \['split'\]"):
        fit_and_export(other, run[0])


def test_figures_of_folds_go_into_an_artefact_that_learnt_from_everything(small_fit, tmp_path):
    config = small_fit.model_copy(update={"split": "all"})
    untested = fit_and_export(config, tmp_path)
    assert untested.metrics == [] and untested.calibration.n == 0 and untested.conformal is None

    cross_validate_and_keep(config, tmp_path, lambda line: None)
    manifest = export_run(config, tmp_path, tmp_path / "again")
    protocols = {metric.protocol for metric in manifest.metrics}
    assert "2 x 5 random folds, all tiles" in protocols
    assert any("slides out" in protocol for protocol in protocols)
    assert manifest.calibration.n == len({record.slide for record in read_tiles(config).records})
    assert manifest.gate.max_distance is not None and manifest.gate.max_foreign_share is not None
    assert untested.gate.max_distance is None, "no network was asked about a tile it had not seen"
    found = open_classifier(tmp_path / "again", device="cpu").reference
    assert found is not None and found.palette.any()
    assert {"share answered ok", "ece after temperature", "area under risk and coverage"} <= {
        metric.name for metric in manifest.metrics
    }
    assert json.loads((tmp_path / "folds" / "metrics.json").read_text())[0]["name"] == "accuracy"
    pictures = {path.name for path in (tmp_path / "folds" / "2-x-5-random-folds-all-tiles").iterdir()}
    assert pictures == {"scores.json", "confusion.png", "reliability.png", "risk-coverage.png", "comparison.png"}


def test_folds_of_other_settings_are_neither_continued_nor_told_of(small_fit, tmp_path, caplog):
    folds = tmp_path / "folds"
    claim(folds, small_fit, BESIDE_FOLDS)
    np.save(folds / "old.npy", np.zeros(1))
    fewer = small_fit.optimisation.model_copy(update={"steps": 1})
    other = small_fit.model_copy(update={"optimisation": fewer})
    with pytest.raises(BadConfig, match=r"folds holds a run with other \['optimisation'\]"):
        cross_validate_and_keep(other, tmp_path, print)
    with pytest.raises(BadConfig, match=r"folds holds a run with other \['optimisation'\]"):
        fit_and_export(other.model_copy(update={"split": "all"}), tmp_path)


def test_folds_that_a_run_makes_no_use_of_are_pointed_at(small_fit, tmp_path, caplog):
    claim(tmp_path / "folds", small_fit.model_copy(update={"split": "all"}), BESIDE_FOLDS)
    fit_and_export(small_fit, tmp_path)
    assert 'with split = "all"' in caplog.text


def test_a_run_belongs_to_the_weights_that_it_starts_from(small_fit, tmp_path):
    config = small_fit.model_copy(update={"init": tmp_path / "first.pt"})
    config.init.write_bytes(b"these")
    claim(tmp_path / "run", config)
    claim(tmp_path / "run", config)
    config.init.write_bytes(b"those")
    with pytest.raises(BadConfig, match=r"holds a run with other \['init_sha256'\]"):
        claim(tmp_path / "run", config)


def test_folds_of_other_tiles_are_refused(small_fit, tmp_path):
    config = small_fit.model_copy(update={"split": "all"})
    fit_and_export(config, tmp_path)
    (tmp_path / "folds").mkdir()
    np.savez(tmp_path / "folds" / "random.npz", logits=np.zeros((1, 30, 3)), folds=np.zeros((1, 30)), sha256=["x"] * 30)
    with pytest.raises(BadConfig, match="made of other tiles"):
        export_run(config, tmp_path, tmp_path / "again")


def test_fp16_is_added_on_request_and_keeps_the_answers(run, small_fit, tmp_path):
    config = small_fit.model_copy(update={"card": Card(fp16=True, int8=False)})
    manifest = export_run(config, run[0], tmp_path / "with16")
    assert manifest.precisions() == ["fp32", "fp16"]
    assert manifest.variants["fp16"].mean_probability_change < 1e-3
    assert open_classifier(tmp_path / "with16", device="cpu", precision="fp16").precision == "fp16"


def test_classes_get_names_and_colours_where_nobody_described_them():
    card = complete(Card(), ["a", "b", "c"])
    assert [c.name for c in card.classes] == ["a", "b", "c"] and len({c.color for c in card.classes}) == 3
    described = Card(classes=[TissueClass(name=name, description="", color="#000000") for name in "ba"])
    with pytest.raises(BadConfig, match="same order needed"):
        complete(described, ["a", "b"])
