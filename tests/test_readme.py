"""What the README shows is run as it stands there, against the real service with the shipped artefact."""

import re
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
    Image.fromarray(draw_tile("Tumor", 0)).save(tmp_path / "tile.png")
    return tmp_path


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def commands(program: str) -> list[str]:
    lines = "\n".join(blocks("sh")).replace("\\\n", " ").splitlines()
    return [line.split("   #")[0] for line in lines if line.startswith(program + " ")]


@pytest.mark.skipif(shutil.which("curl") is None, reason="there is no curl here")
@pytest.mark.parametrize("command", commands("curl"))
def test_each_curl_is_answered(command, address, folder):
    done = subprocess.run(
        command.replace(ADDRESS, address) + " --fail --silent --show-error",
        shell=True,
        cwd=folder,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    wanted = README[README.index(command.split(" \\")[0].split("  ")[0]) :]
    for key in re.findall(r'^ *"(\w+)":', wanted[: wanted.index("```", wanted.index("```json") + 7)], re.M)[:4]:
        assert f'"{key}"' in done.stdout or "-o " in command


def test_the_python_example_runs(address, folder):
    (example,) = blocks("python")
    done = subprocess.run(
        [sys.executable, "-c", example.replace(ADDRESS, address)], cwd=folder, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert re.match(r"\w+ 0?\.\d+|\w+ 1\.0", done.stdout)
