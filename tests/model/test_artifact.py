import json
from pathlib import Path

import pytest

from model.artifact import MANIFEST, CorruptArtifact, read_manifest, verify_files


@pytest.fixture
def artifact(tiny_artifact, tmp_path):
    """A copy that a test may damage."""
    for path in tiny_artifact.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    return tmp_path


def change(folder, **changes):
    content = json.loads((folder / MANIFEST).read_text())
    content.update(changes)
    (folder / MANIFEST).write_text(json.dumps(content))


def test_an_artifact_reads_back_and_verifies(artifact):
    manifest = read_manifest(artifact)
    verify_files(manifest, artifact)
    assert manifest.precisions()[0] == "fp32"
    assert manifest.file("predict", "fp32").path == "predict.onnx"


def test_a_folder_without_manifest_is_refused(tmp_path):
    with pytest.raises(CorruptArtifact, match=r"holds no manifest\.json"):
        read_manifest(tmp_path)
    with pytest.raises(CorruptArtifact, match=r"there is no folder .*tissu$"):
        read_manifest(tmp_path / "tissu")


@pytest.mark.skipif(not Path("/proc/self/mem").exists(), reason="a file that exists and can't be read, by anybody")
@pytest.mark.parametrize("name", [MANIFEST, "predict.onnx"])
def test_a_file_that_cannot_be_read_is_named(artifact, name):
    (artifact / name).unlink()
    (artifact / name).symlink_to("/proc/self/mem")
    with pytest.raises(CorruptArtifact, match=f"{name} can't be read: Input/output error"):
        verify_files(read_manifest(artifact), artifact)


def test_unknown_keys_are_refused(artifact):
    change(artifact, colour="red")
    with pytest.raises(CorruptArtifact, match="colour"):
        read_manifest(artifact)


def test_another_format_is_refused(artifact):
    change(artifact, format=2)
    with pytest.raises(CorruptArtifact, match="format"):
        read_manifest(artifact)


@pytest.mark.parametrize("path", ["../weights.bin", "/etc/passwd", "a/b.onnx", ".hidden"])
def test_files_lie_beside_the_manifest_and_nowhere_else(artifact, path):
    files = json.loads((artifact / MANIFEST).read_text())["files"]
    files[0]["path"] = path
    change(artifact, files=files)
    with pytest.raises(CorruptArtifact, match="path"):
        read_manifest(artifact)


def test_classes_must_differ_and_match_the_golden_answer(artifact):
    classes = json.loads((artifact / MANIFEST).read_text())["classes"]
    change(artifact, classes=[classes[0]] * len(classes))
    with pytest.raises(CorruptArtifact, match="class names must differ"):
        read_manifest(artifact)
    change(artifact, classes=classes[:-1])
    with pytest.raises(CorruptArtifact, match="golden has"):
        read_manifest(artifact)


@pytest.mark.parametrize(
    ("key", "value", "complaint"),
    [
        ("tile_px", -150, "greater than 0"),
        ("tile_px", 150_000_000, "less than or equal to 2048"),
        ("name", "a\x1b]0;title\x07", "should match pattern"),
        ("grid", 0, "greater than 0"),
        ("golden", {"tolerance": {}}, "no tolerance for"),
        ("golden", {"tolerance": {"fp32": 1e9}}, "less than or equal to 0.1"),
        ("conformal", {"coverages": [0.8, 0.9], "default": 0.9}, "one list per coverage"),
        ("conformal", {"coverages": [0.8], "default": 0.9}, "default coverage 0.9 is none of"),
    ],
)
def test_numbers_that_do_not_go_together_are_refused(artifact, key, value, complaint):
    content = json.loads((artifact / MANIFEST).read_text())
    if key == "conformal":
        value |= {"thresholds": [[0.5] * len(content["classes"])], "n": 9, "protocol": "none"}
    change(artifact, **{key: content[key] | value if key == "golden" else value})
    with pytest.raises(CorruptArtifact, match=complaint):
        read_manifest(artifact)


def test_one_changed_byte_is_found_and_named(artifact):
    weights = artifact / "weights.bin"
    content = bytearray(weights.read_bytes())
    content[1000] ^= 1
    weights.write_bytes(content)
    with pytest.raises(CorruptArtifact, match=r"weights\.bin is not the file the manifest lists: expected sha256"):
        verify_files(read_manifest(artifact), artifact)


@pytest.mark.parametrize("name", ["weights.bin", "deep/more.bin"])
def test_a_file_that_nobody_lists_is_refused_unless_it_is_a_note(artifact, name):
    manifest = read_manifest(artifact)
    unlisted = manifest.model_copy(update={"files": [file for file in manifest.files if file.path != name]})
    for note in ("README.md", ".DS_Store", "..2026/weights.bin", name):
        (artifact / note).parent.mkdir(exist_ok=True)
        (artifact / note).touch()
    with pytest.raises(CorruptArtifact, match=f"holds {name}, which the manifest does not list"):
        verify_files(unlisted, artifact)
    (artifact / name).unlink()
    verify_files(unlisted, artifact)


def test_a_missing_file_is_named(artifact):
    (artifact / "explain.onnx").unlink()
    with pytest.raises(CorruptArtifact, match=r"explain\.onnx is missing"):
        verify_files(read_manifest(artifact), artifact)


def test_a_precision_that_is_not_there_is_named(artifact):
    with pytest.raises(CorruptArtifact, match="no predict file of precision fp16"):
        read_manifest(artifact).file("predict", "fp16")
