"""What the README shows is run as it stands there, with the shipped artefact and the repository's own files."""

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from app.settings import SHIPPED_ARTIFACT
from tests.app.conftest import start
from training.synthetic import draw_tile, write_tree

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
ADDRESS = "http://127.0.0.1:8000"
ENVIRON = {
    **{name: value for name, value in os.environ.items() if not name.startswith("TISSUE_")},
    "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",  # where `tissue` is installed
    "TISSUE_PORT": "0",
    "TISSUE_DRAIN_MS": "0",
}
# The same commands at a size that takes seconds.
SMALL = (
    " repeats=1 model.width=32 model.layers=1 model.heads=2 optimisation.steps=2 optimisation.batch=8 card.int8=false"
)

needs_curl = pytest.mark.skipif(shutil.which("curl") is None, reason="there is no curl here")
needs_make = pytest.mark.skipif(shutil.which("make") is None, reason="there is no make here")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def commands() -> list[str]:
    lines = [line.partition("   #")[0].rstrip() for block in blocks("sh") for line in block.splitlines()]
    return [command for line in lines if not line.startswith("# ") for command in line.split(" && ")]


def starting_with(*programs: str) -> list[str]:
    return [command for command in commands() if command.startswith(programs)]


@pytest.fixture(scope="module")
def address():
    with start(artifact=SHIPPED_ARTIFACT, device="cpu") as process:
        yield process.url


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A clone as the README's reader has it, with nothing made in it yet but tiles of his own."""
    clone: Path = tmp_path_factory.mktemp("clone")
    (clone / "model").symlink_to(ROOT / "model")
    shutil.copytree(ROOT / "configs", clone / "configs")
    write_tree(clone / "my-tiles", 6, kinds=("Tumor", "Stroma", "Mucosa"))
    for command in starting_with("cp "):
        run(command, clone)
    mine = clone / "configs" / "mine.toml"
    text = re.sub(r"^(generate|classes) = .*\n", "", mine.read_text(), flags=re.M)
    mine.write_text(text.replace('"smoke"', '"mine"').replace('"runs/smoke-tiles"', '"my-tiles"\nimage_mpp = 0.495'))
    return clone


def run(command: str, folder: Path) -> str:
    done = subprocess.run(command, shell=True, cwd=folder, env=ENVIRON, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def serve(command: str, folder: Path) -> dict[str, str]:
    """What the service is ready with; then it is stopped."""
    process = subprocess.Popen(
        f"exec env TISSUE_LOG_FORMAT=json {command}", shell=True, cwd=folder, env=ENVIRON, stderr=subprocess.PIPE
    )
    assert process.stderr is not None
    with process:
        events = [json.loads(line) for _, line in zip(range(2), process.stderr, strict=False)]
        process.send_signal(signal.SIGTERM)
        process.stderr.read()  # to its end: a service whose log nobody takes any more does not end well
    assert process.returncode == 0
    assert [event["event"] for event in events] == ["starting", "ready"]
    ready: dict[str, str] = events[1]
    return ready


def look_the_same(picture: Path, other: Path) -> bool:
    """To a level of 255 or two: processors round the map differently."""
    pixels, expected = (np.asarray(Image.open(path).convert("RGB"), np.int16) for path in (picture, other))
    return pixels.shape == expected.shape and int(np.abs(pixels - expected).max()) <= 2


def test_no_command_is_left_out():
    tried = {
        *starting_with(
            "make ", "cp ", "curl ", "tissue ", "tissue-train ", "TISSUE_ARTIFACT=runs/mine/artifact tissue"
        ),
        "python -m pip install .",  # below
        "docker compose up",  # in test_deploy.py
        ". .venv/bin/activate",
    }
    assert set(commands()) == tried


@needs_curl
@pytest.mark.parametrize("command", starting_with("curl"))
def test_each_curl_is_answered_as_shown(command, address, folder):
    answer = run(command.replace(ADDRESS, address) + " --fail --silent --show-error", folder)
    shown = re.search(rf"^{re.escape(command)}\n# (.*?)…?$", README, re.M)
    assert answer.startswith(shown[1] if shown else "")
    if "-o overlay.png" in command:
        assert look_the_same(folder / "overlay.png", ROOT / "docs" / "images" / "overlay.png")


@needs_curl
def test_the_answer_shown_is_the_one_that_comes(address, folder):
    shown = json.loads(blocks("json")[0])
    answer = json.loads(run(starting_with("curl")[0].replace(ADDRESS, address) + " --silent", folder))
    assert answer.keys() == shown.keys()
    assert answer["input"] == shown["input"]
    assert (answer["label"], answer["verdict"], answer["model"]["digest"]) == (
        shown["label"],
        shown["verdict"],
        shown["model"]["digest"],
    )
    assert answer["probabilities"] == pytest.approx(shown["probabilities"], abs=2e-3)


def test_the_python_example_runs(address, folder):
    (example,) = blocks("python")
    label, confidence = run(shlex.join([sys.executable, "-c", example.replace(ADDRESS, address)]), folder).split()
    assert label == json.loads(blocks("json")[0])["label"]
    assert float(confidence) == pytest.approx(json.loads(blocks("json")[0])["confidence"], abs=2e-3)


def test_a_picture_is_answered_without_a_server(folder):
    predict, grid, attention, doctor = starting_with("tissue predict", "tissue attention", "tissue doctor")
    expected = json.loads(blocks("json")[0])
    row = re.search(r"tile\.png +(\w+) +(0\.\d+) +(\w+)", run(predict, folder))
    assert row and (row[1], row[3]) == (expected["label"], expected["verdict"])
    assert float(row[2]) == pytest.approx(expected["confidence"], abs=2e-3)
    Image.fromarray(draw_tile("Tumor", 7, 300)).save(folder / "field.png")
    run(grid, folder)
    assert len(json.loads((folder / "field.geojson").read_text())["features"]) == 4
    run(attention, folder)
    assert look_the_same(folder / "overlay.png", ROOT / "docs" / "images" / "overlay.png")
    assert "answered as expected" in run(doctor, folder)


def test_the_service_starts_and_stops(folder):
    (command,) = starting_with("tissue serve")
    assert serve(command, folder)["model_name"] == "default"


def test_the_way_from_ones_own_tiles_to_a_service(folder):
    scan, cross_validate, fit = starting_with("tissue-train")
    assert "Tumor" in run(scan, folder)
    assert "slides out" in run(cross_validate + SMALL, folder)
    assert "artefact: runs/mine/artifact" in run(fit + SMALL, folder)
    (command,) = starting_with("TISSUE_ARTIFACT=")
    assert serve(command, folder)["model_name"] == "mine"


@needs_make
@pytest.mark.parametrize("command", starting_with("make"))
def test_each_make_ends_with_the_command_it_is_for(command, folder):
    last = {"serve": "tissue serve", "test": "pytest", "train": "tissue-train fit configs/smoke.toml"}
    done = subprocess.run(
        [*shlex.split(command), "--dry-run", "--no-print-directory"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.splitlines()[-1] == f".venv/bin/{last[command.split()[1]]}"


def test_the_package_brings_all_that_serving_needs(tmp_path):
    """Built of what the image is built of, and used far from the clone."""
    source, installed = tmp_path / "source", tmp_path / "installed"
    for name in ("app", "model", "training"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    (command,) = starting_with("python -m pip install")
    offline = f"--quiet --no-deps --no-build-isolation --disable-pip-version-check --target {installed}"
    run(f"{command} {offline}", source)
    listed = {path.relative_to(installed) for path in installed.rglob("*") if path.suffix not in (".pyc", ".py")}
    for folder in ("app/web", "model/default"):
        wanted = {path.relative_to(ROOT) for path in (ROOT / folder).rglob("*") if path.is_file()}
        assert wanted <= listed
    shown = run(
        f"env PYTHONPATH={installed} {sys.executable} -P -m app predict {SHIPPED_ARTIFACT}/golden.png", tmp_path
    )
    assert "Tumor" in shown
