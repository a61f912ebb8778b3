"""What the README shows is run as it stands there, against the real service with the shipped artefact."""

import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from app.settings import SHIPPED_ARTIFACT
from tests.app.conftest import start
from training.synthetic import draw_tile

README = (Path(__file__).parents[1] / "README.md").read_text()
ADDRESS = "http://127.0.0.1:8000"


@pytest.fixture(scope="module")
def address():
    with start(artifact=SHIPPED_ARTIFACT) as process:
        yield process.url


@pytest.fixture
def folder(tmp_path):
    for name, kind in (("tile.png", "Tumor"), ("other.png", "Mucosa")):
        Image.fromarray(draw_tile(kind, 0)).save(tmp_path / name)
    return tmp_path


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def commands(program: str) -> list[str]:
    lines = "\n".join(blocks("sh")).replace("\\\n", " ").splitlines()
    return [line.split("   #")[0] for line in lines if line.startswith(program + " ")]


def run(command: str, folder: Path) -> str:
    done = subprocess.run(command, shell=True, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


needs_curl = pytest.mark.skipif(shutil.which("curl") is None, reason="there is no curl here")


@needs_curl
@pytest.mark.parametrize("command", commands("curl"))
def test_each_curl_is_answered(command, address, folder):
    run(command.replace(ADDRESS, address) + " --fail --silent --show-error", folder)


@needs_curl
def test_the_answer_shown_is_the_one_that_comes(address, folder):
    shown = json.loads(blocks("json")[0])
    answer = json.loads(run(commands("curl")[0].replace(ADDRESS, address) + " --silent", folder))
    assert answer.keys() == shown.keys()
    assert (answer["label"], answer["verdict"], answer["model"]["digest"]) == (
        shown["label"],
        shown["verdict"],
        shown["model"]["digest"],
    )
    assert answer["probabilities"] == pytest.approx(shown["probabilities"], abs=2e-3)


def test_the_python_example_runs(address, folder):
    (example,) = blocks("python")
    shown = run(shlex.join([sys.executable, "-c", example.replace(ADDRESS, address)]), folder)
    assert re.match(r"\w+ [01]\.\d+", shown)
