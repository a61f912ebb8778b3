import json
import os
import shutil
import time
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from app import doctor
from app.__main__ import cli
from app.doctor import Finding, examine, measure_rate
from app.settings import Settings
from model.session import available_cores, has_nvidia_driver


@pytest.fixture(autouse=True)
def hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "MEASURE_S", 0.05)
    for name in [name for name in os.environ if name.startswith("TISSUE_")]:
        monkeypatch.delenv(name)


@pytest.fixture
def copied(tiny_artifact: Path, tmp_path: Path) -> Path:
    """An artefact that a test may damage."""
    return Path(shutil.copytree(tiny_artifact, tmp_path / "artifact"))


def look(**settings: object) -> dict[str, Finding]:
    return {finding.subject: finding for finding in examine(Settings.model_validate(settings))}


def test_healthy_installation_needs_nothing(tiny_artifact):
    findings = look(artifact=tiny_artifact, device="cpu")
    assert not [finding for finding in findings.values() if finding.advice]
    assert list(findings) == [
        "tissue",
        "python",
        "onnxruntime",
        "device",
        "threads",
        "artifact",
        "golden tile",
        "images/s",
    ]
    assert str(tiny_artifact) in findings["artifact"].text
    assert findings["golden tile"].text == "answered as expected, fp32 on cpu"
    assert findings["threads"].text.startswith(f"{available_cores()} of ")
    assert int(findings["images/s"].text.split()[0]) > 0


def test_missing_artefact_ends_the_examination(tmp_path):
    findings = look(artifact=tmp_path, device="cpu")
    assert str(tmp_path) in findings["artifact"].text
    assert "TISSUE_ARTIFACT" in findings["artifact"].advice
    assert "golden tile" not in findings


def test_changed_byte_is_found(copied):
    graph = copied / "predict.onnx"
    content = bytearray(graph.read_bytes())
    content[len(content) // 2] ^= 1
    graph.write_bytes(content)
    finding = look(artifact=copied, device="cpu")["artifact"]
    assert "sha256" in finding.text
    assert finding.advice


def test_wrong_answer_to_the_golden_tile_is_found(copied):
    manifest = json.loads((copied / "manifest.json").read_text())
    probabilities = manifest["golden"]["probabilities"]
    manifest["golden"]["probabilities"] = [*probabilities[1:], abs(probabilities[0] - 0.5)]
    (copied / "manifest.json").write_text(json.dumps(manifest))
    findings = look(artifact=copied, device="cpu")
    assert not findings["artifact"].advice
    assert "expected" in findings["golden tile"].text
    assert findings["golden tile"].advice
    assert "images/s" not in findings


def test_more_threads_than_cores_are_found(tiny_artifact):
    granted = available_cores()
    found = look(artifact=tiny_artifact, device="cpu", infer_threads=granted + 1, intra_threads=granted + 1)["threads"]
    assert "TISSUE_INFER_THREADS" in found.advice and "TISSUE_INTRA_THREADS" in found.advice
    as_unset = look(artifact=tiny_artifact, device="cpu", infer_threads=granted, intra_threads=granted)
    assert not as_unset["threads"].advice


@pytest.mark.skipif(has_nvidia_driver(), reason="there is a GPU")
def test_gpu_that_is_not_there_is_found(tiny_artifact):
    findings = look(artifact=tiny_artifact, device="cuda")
    assert "driver" in findings["device"].advice
    assert "TISSUE_DEVICE=cpu" in findings["golden tile"].advice


@pytest.mark.parametrize("callers", [1, 3])
def test_rate_counts_the_calls_of_all_callers(callers):
    calls: list[float] = []
    start = time.perf_counter()
    rate = measure_rate(lambda: calls.append(time.perf_counter()), callers)
    took_s = time.perf_counter() - start
    counted = len(calls) - 1  # the first is not measured
    assert counted >= callers
    assert counted / took_s <= rate <= counted / doctor.MEASURE_S


def test_command_tells_findings_and_ends_with_1_where_something_is_wrong(tiny_artifact, tmp_path, monkeypatch):
    monkeypatch.setenv("TISSUE_DEVICE", "cpu")
    good = CliRunner().invoke(cli, ["doctor", "--artifact", str(tiny_artifact)])
    assert (good.exit_code, good.stderr) == (0, "")
    lines = good.stdout.splitlines()
    assert all(line.startswith("ok  ") for line in lines)
    assert np.unique([line.split()[1] for line in lines]).size == len(lines)

    bad = CliRunner().invoke(cli, ["doctor", "--artifact", str(tmp_path)])
    assert bad.exit_code == 1
    assert "!!  artifact" in bad.stdout
    assert "-> set TISSUE_ARTIFACT" in bad.stdout
    assert bad.stderr == "tissue: 1 of these must be mended\n"
