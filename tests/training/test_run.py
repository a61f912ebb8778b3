import json
import shutil
from dataclasses import replace
from functools import partial

import numpy as np
import pytest

from model.artifact import TissueClass, read_manifest, verify_files
from model.session import open_classifier
from training import checkpoint
from training.config import BadConfig, Card
from training.data import NoClasses
from training.export import NotAnArtefact
from training.fit import read_tiles
from training.folds import TooFewImages
from training.run import (
    IGNORED_BY_FOLDS,
    UnfinishedRun,
    choose_check_tiles,
    claim,
    complete_card,
    cross_validate_and_keep,
    export_run,
    fit_and_export,
    is_finished,
)


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
    with pytest.raises(BadConfig, match=r"split changed since .*small was begun; .* remove all that is in it$"):
        fit_and_export(other, run[0])


def test_a_run_that_was_killed_is_not_exported(run, small_fit, tmp_path):
    shutil.copytree(run[0], tmp_path / "run")
    state = checkpoint.load(tmp_path / "run" / "latest.pt")
    checkpoint.save(state | {"step": 3}, tmp_path / "run" / "latest.pt")
    with pytest.raises(UnfinishedRun, match=r"run stopped at step 3 of 4: `tissue-train fit` .* goes on with it"):
        export_run(small_fit, read_tiles(small_fit), tmp_path / "run", tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_other_settings_are_told_before_weights_that_do_not_fit(run, small_fit, tmp_path):
    deeper = small_fit.model_copy(update={"model": replace(small_fit.model, layers=3)})
    with pytest.raises(BadConfig, match="model changed since"):
        export_run(deeper, read_tiles(small_fit), run[0], tmp_path / "new")


def test_a_folder_that_is_no_artefact_is_refused_before_anything_is_measured(small_fit, tmp_path):
    (tmp_path / "thesis.txt").write_text("three years")
    with pytest.raises(NotAnArtefact, match=r"has no manifest\.json"):
        export_run(small_fit, read_tiles(small_fit), tmp_path / "nothing learnt", tmp_path)


def test_what_is_refused_claims_no_folder(small_fit, tile_folder, tmp_path):
    shutil.copytree(tile_folder, tmp_path / "tiles")
    for path in sorted((tmp_path / "tiles" / "01_TUMOR").iterdir())[4:]:
        path.unlink()
    data = small_fit.data.model_copy(update={"folder": tmp_path / "tiles"})
    config = small_fit.model_copy(update={"data": data})
    for train in (fit_and_export, partial(cross_validate_and_keep, tell=print)):
        with pytest.raises(TooFewImages, match=r"needs 5 images of each class.*, but Tumor has 4: add images"):
            train(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_weights_that_are_not_there_claim_no_folder(small_fit, tmp_path):
    config = small_fit.model_copy(update={"init": tmp_path / "latest.pt"})
    for train in (fit_and_export, partial(cross_validate_and_keep, tell=print)):
        with pytest.raises(BadConfig, match=r"init is .*latest\.pt, and there is no such file$"):
            train(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_checkpoint_counts_as_finished_when_its_run_has_no_steps_to_go(run, tmp_path):
    assert is_finished(run[0] / "latest.pt")
    shutil.copytree(run[0], tmp_path / "run")
    state = checkpoint.load(tmp_path / "run" / "latest.pt")
    checkpoint.save(state | {"step": 3}, tmp_path / "run" / "latest.pt")
    assert not is_finished(tmp_path / "run" / "latest.pt")
    assert not is_finished(tmp_path / "later.pt")
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "published.pth").touch()
    assert is_finished(tmp_path / "published.pth")


def test_settings_that_cannot_be_read_are_named(small_fit, tmp_path):
    (tmp_path / "config.json").write_text('{"name": "sm')
    with pytest.raises(BadConfig, match=r"config\.json tells what .* was begun with, and is no JSON"):
        claim(tmp_path, small_fit)


def test_settings_are_written_once_and_whole(small_fit, tmp_path):
    claim(tmp_path, small_fit)
    written = (tmp_path / "config.json").stat()
    claim(tmp_path, small_fit)
    assert (tmp_path / "config.json").stat().st_mtime_ns == written.st_mtime_ns
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]


def test_slides_are_left_out_where_there_are_any_or_it_is_said_that_there_are_none(
    small_fit, tile_folder, tmp_path, caplog
):
    for number, path in enumerate(tile_folder.rglob("*.png")):
        (tmp_path / "tiles" / path.parent.name).mkdir(parents=True, exist_ok=True)
        shutil.copy(path, tmp_path / "tiles" / path.parent.name / f"{number}.png")
    data = small_fit.data.model_copy(update={"folder": tmp_path / "tiles"})
    config = small_fit.model_copy(update={"data": data, "repeats": 1, "folds": 2})
    with pytest.raises(TooFewImages, match=r"0 of 30 images name 0 slides; .* name them in a table"):
        cross_validate_and_keep(config.model_copy(update={"groupings": ["slide"]}), tmp_path, print)
    cross_validate_and_keep(config, tmp_path, print)
    assert "no slides are left out, as the tiles name fewer than two" in caplog.text


def test_figures_of_folds_go_into_an_artefact_that_learnt_from_everything(small_fit, tmp_path, caplog):
    config = small_fit.model_copy(update={"split": "all"})
    untested = fit_and_export(config, tmp_path)
    assert "nothing was held out: the artefact tells no figures" in caplog.text
    assert untested.metrics == [] and untested.calibration.n == 0 and untested.conformal is None

    cross_validate_and_keep(config, tmp_path, lambda line: None)
    manifest = export_run(config, read_tiles(config), tmp_path, tmp_path / "again")
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


def test_folds_of_other_settings_are_neither_continued_nor_told_of(small_fit, tmp_path):
    claim(tmp_path / "folds", small_fit, read_tiles(small_fit), IGNORED_BY_FOLDS)
    fewer = small_fit.optimisation.model_copy(update={"steps": 1})
    other = small_fit.model_copy(update={"optimisation": fewer})
    with pytest.raises(BadConfig, match=r"optimisation changed since .*folds was begun"):
        cross_validate_and_keep(other, tmp_path, print)
    with pytest.raises(BadConfig, match=r"optimisation changed since .*folds was begun"):
        fit_and_export(other.model_copy(update={"split": "all"}), tmp_path)


def test_folds_that_a_run_makes_no_use_of_are_pointed_at(small_fit, tmp_path, caplog):
    claim(tmp_path / "folds", small_fit, read_tiles(small_fit), IGNORED_BY_FOLDS)
    fit_and_export(small_fit, tmp_path)
    assert 'with split = "all"' in caplog.text
    with pytest.raises(BadConfig, match=r"split changed .* remove all that is in it but .*folds$"):
        fit_and_export(small_fit.model_copy(update={"split": "all"}), tmp_path)


def test_a_run_belongs_to_the_weights_that_it_starts_from(small_fit, tmp_path):
    config = small_fit.model_copy(update={"init": tmp_path / "first.pt"})
    config.init.write_bytes(b"these")
    claim(tmp_path / "run", config)
    claim(tmp_path / "run", config)
    config.init.write_bytes(b"those")
    with pytest.raises(BadConfig, match="weights changed since"):
        claim(tmp_path / "run", config)
    with pytest.raises(BadConfig, match="init and weights changed since"):
        claim(tmp_path / "run", small_fit)


@pytest.mark.parametrize("changed", ["pixels", "label", "slide", "near duplicates", "one less"])
def test_a_run_belongs_to_its_tiles(small_fit, tmp_path, changed):
    tiles = read_tiles(small_fit)
    first, *others = tiles.records
    other = {
        "pixels": replace(tiles, records=[replace(first, sha256="x"), *others]),
        "label": replace(tiles, records=[replace(first, label="Lympho"), *others]),
        "slide": replace(tiles, records=[replace(first, slide=None), *others]),
        "near duplicates": replace(tiles, near_duplicates=np.arange(30)),
        "one less": tiles.subset(np.arange(1, 30)),
    }
    claim(tmp_path, small_fit, tiles)
    claim(tmp_path, small_fit, read_tiles(small_fit))
    with pytest.raises(BadConfig, match=r"^tiles changed since .* was begun; give this run another name"):
        claim(tmp_path, small_fit, other[changed])


def test_neither_a_network_nor_folds_of_other_tiles_are_taken_up(small_fit, tile_folder, tmp_path):
    shutil.copytree(tile_folder, tmp_path / "tiles")
    data = small_fit.data.model_copy(update={"folder": tmp_path / "tiles"})
    config = small_fit.model_copy(update={"data": data, "repeats": 1, "groupings": ["random"]})
    fit_and_export(config, tmp_path / "run")
    cross_validate_and_keep(config, tmp_path / "run", print)
    next((tmp_path / "tiles").rglob("*TUMOR*/*.png")).unlink()
    for go_on in (
        lambda: fit_and_export(config, tmp_path / "run"),
        lambda: export_run(config, read_tiles(config), tmp_path / "run", tmp_path / "again"),
        lambda: cross_validate_and_keep(config, tmp_path / "run", print),
    ):
        with pytest.raises(BadConfig, match="tiles changed since"):
            go_on()


def test_other_folds_are_refused_before_the_training_that_would_tell_their_figures(small_fit, tmp_path):
    config = small_fit.model_copy(update={"split": "all", "repeats": 1, "groupings": ["random"]})
    folds = tmp_path / "run" / "folds"
    folds.mkdir(parents=True)
    (folds / "config.json").write_text("{}")
    with pytest.raises(BadConfig, match=r"changed since .*folds was begun"):
        fit_and_export(config, tmp_path / "run")
    assert not (tmp_path / "run" / "latest.pt").exists()


def test_fp16_is_added_on_request_and_keeps_the_answers(run, small_fit, tmp_path):
    config = small_fit.model_copy(update={"card": Card(fp16=True, int8=False)})
    manifest = export_run(config, read_tiles(config), run[0], tmp_path / "with16")
    assert manifest.precisions() == ["fp32", "fp16"]
    assert manifest.variants["fp16"].mean_probability_change < 1e-3
    assert open_classifier(tmp_path / "with16", device="cpu", precision="fp16").precision == "fp16"


def test_checks_go_over_all_images_of_the_cards_folder_and_over_nothing_else(small_fit, tmp_path):
    config = small_fit.model_copy(update={"card": Card(check_tiles=tmp_path)})
    tiles = read_tiles(config)
    with pytest.raises(NoClasses, match="holds no images"):
        choose_check_tiles(config, tiles)
    (tmp_path / ".DS_Store").write_bytes(b"")
    (tmp_path / "labels.csv").write_text("file,label\n")
    shutil.copy(tiles.records[0].path, tmp_path)
    np.testing.assert_array_equal(choose_check_tiles(config, tiles), [*tiles.tiles, tiles.tiles[0]])


def test_classes_get_names_and_colours_where_nobody_described_them():
    card = complete_card(Card(), ["a", "b", "c"])
    assert [c.name for c in card.classes] == ["a", "b", "c"] and len({c.color for c in card.classes}) == 3
    described = Card(classes=[TissueClass(name=name, description="", color="#000000") for name in "ba"])
    with pytest.raises(BadConfig, match="same order needed"):
        complete_card(described, ["a", "b"])
