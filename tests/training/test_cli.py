import json
import subprocess
import sys

import pytest
from PIL import Image
from typer.testing import CliRunner

from training.commands import cli


@pytest.fixture
def tissue_train():
    def run(*arguments):
        return CliRunner().invoke(cli, [str(argument) for argument in arguments])

    return run


@pytest.fixture
def config(tile_folder, tmp_path):
    path = tmp_path / "x.toml"
    path.write_text(
        f'name = "x"\n[data]\nfolder = "{tile_folder}"\ntile_mpp = 0.495\nclasses = ["Tumor", "Lympho"]\n'
        "[model]\nwidth = 32\nlayers = 1\nheads = 2\n"
        "[optimisation]\nsteps = 2\nbatch = 8\nvalidate_every = 2\ncheckpoint_every = 2\n[card]\nint8 = false\n"
    )
    return path


def test_from_tiles_to_a_card_in_four_commands(tissue_train, config, tile_folder, tmp_path):
    runs, artifact = tmp_path / "runs", tmp_path / "runs" / "x" / "artifact"
    fitted = tissue_train("fit", config, "--runs", runs)
    assert fitted.exit_code == 0 and "accuracy" in fitted.output
    long = next(line for line in fitted.stdout.splitlines() if "histogram and patterns" in line)
    assert long.endswith("(one random fifth held out)"), "it is not broken"
    evaluated = tissue_train("evaluate", artifact, tile_folder, "--folder", tmp_path / "scores")
    assert evaluated.exit_code == 0 and "macro_f1" in evaluated.output
    assert json.loads((tmp_path / "scores" / "scores.json").read_text())["accuracy"]["n"] == 10  # slides
    assert (tmp_path / "scores" / "confusion.png").exists()
    assert tissue_train("report", artifact, tmp_path / "card.md").exit_code == 0
    card = (tmp_path / "card.md").read_text()
    assert "# Model card: x" in card and "one random fifth held out" in card and "| Lympho |" in card


def test_a_misspelt_key_is_one_sentence_and_no_traceback(tissue_train, config):
    result = tissue_train("fit", config, "optimisation.stpes=3")
    assert result.exit_code == 1
    assert "unknown key 'stpes'; the nearest known one is 'steps'" in result.output
    assert "Traceback" not in result.output


def test_a_tree_is_scanned_and_what_is_wrong_with_it_told(tissue_train, tmp_path):
    assert tissue_train("data", "synth", tmp_path / "tiles", "--per-class", "2").exit_code == 0
    first = min((tmp_path / "tiles").rglob("*.png"))
    first.write_bytes(first.read_bytes()[:200])
    (first.parent / "text.tif").write_text("not an image")
    result = tissue_train("data", "scan", tmp_path / "tiles")
    assert result.exit_code == 0
    assert f"skipped {first}" in result.output.replace("\n", "") and "text.tif" in result.output


def test_an_image_that_is_too_small_by_its_own_tag_is_listed_and_the_others_scanned(tissue_train, tmp_path):
    assert tissue_train("data", "synth", tmp_path / "tiles", "--per-class", "2").exit_code == 0
    first, second = sorted((tmp_path / "tiles").rglob("*.png"))[:2]
    with Image.open(second) as image:
        image.rotate(90).save(second.with_name("z twin.png"))
    with Image.open(first) as image:
        image.save(first, dpi=(25_400 / 0.2,) * 2)  # 30 um, of 74 in a tile
    result = tissue_train("data", "scan", tmp_path / "tiles")
    assert result.exit_code == 0
    assert f"skipped {first}: " in result.output
    assert f"look alike, kept in one fold: {second} and " in result.output


def test_brackets_of_names_are_told_as_they_are(tissue_train, tmp_path):
    for name in ("[masked]", "[/masked]"):
        result = tissue_train("fit", tmp_path / name / "x.toml")
        assert result.exit_code == 1 and f"{tmp_path}/{name}/x.toml can't be read" in result.output
    tissue_train("data", "synth", tmp_path / "[tiles]", "--per-class", "1")
    (tmp_path / "[tiles]" / "01_TUMOR").rename(tmp_path / "[tiles]" / "[bold]")
    assert "[bold]" in tissue_train("data", "scan", tmp_path / "[tiles]").output


def test_an_empty_class_is_refused(tissue_train, tmp_path):
    tissue_train("data", "synth", tmp_path / "tiles", "--per-class", "1")
    (tmp_path / "tiles" / "09_NOTHING").mkdir()
    result = tissue_train("data", "scan", tmp_path / "tiles")
    assert result.exit_code == 1 and "09_NOTHING holds no images" in result.output.replace("\n", "")


def test_the_loop_is_measured_against_bare_passes(tissue_train, config):
    result = tissue_train("bench", config, "--steps", "2")
    assert result.exit_code == 0 and "share" in result.output


def test_without_the_packages_for_training_it_says_what_to_install():
    code = "import sys; sys.modules['torch'] = None; from training.__main__ import main; main()"
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert ended.returncode == 1
    assert ended.stderr.startswith("tissue-train needs torch") and "pip install '.[train]'" in ended.stderr
    assert "Traceback" not in ended.stderr
