import io
import json
import subprocess
import sys
import time
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from model.artifact import MANIFEST, CorruptArtifact, digest
from model.runtime import ort
from model.session import DeviceUnavailable, check_golden, has_nvidia_driver, load_golden, open_classifier, open_session


@pytest.fixture(scope="module")
def classifier(tiny_artifact):
    return open_classifier(tiny_artifact, device="cpu", intra_threads=2)


@pytest.fixture
def artifact(tiny_artifact, tmp_path):
    for path in tiny_artifact.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    return tmp_path


def random_tiles(n, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (n, 150, 150, 3), dtype=np.uint8)


def test_answers_have_the_shapes_of_the_manifest(classifier):
    m = classifier.manifest
    k, g = len(m.classes), m.grid
    predicted, explained = classifier.predict(random_tiles(3)), classifier.explain(random_tiles(3))
    assert predicted.probabilities.shape == (3, k)
    assert predicted.probabilities.sum(1) == pytest.approx(1, abs=1e-5)
    assert predicted.features.shape == (3, m.feature_width)
    assert explained.attention.shape == (3, m.layers, m.heads, g, g)
    assert explained.rollout.shape == (3, g, g)
    assert explained.evidence.shape == (3, k, g, g)


def test_predict_and_explain_agree(classifier):
    tiles = random_tiles(4)
    predicted, explained = classifier.predict(tiles), classifier.explain(tiles)
    np.testing.assert_allclose(predicted.logits, explained.logits, atol=1e-4)


def test_a_lone_call_and_one_of_a_crowd_give_the_same_digits(classifier):
    alone, crowd = classifier.predict(random_tiles(1), alone=True), classifier.predict(random_tiles(1), alone=False)
    for name, value in vars(alone).items():
        np.testing.assert_array_equal(value, getattr(crowd, name))


def test_between_calls_nobody_spins(classifier):
    """Else each call would be followed by 40 ms of a busy core."""
    tile = np.zeros((1, 150, 150, 3), np.uint8)
    took_s = []
    for _ in range(5):
        classifier.predict(tile)
        before = time.process_time()
        time.sleep(0.05)
        took_s.append(time.process_time() - before)
    assert sorted(took_s)[2] < 0.01


def test_removing_patches_changes_the_answer_and_silences_their_maps(classifier):
    tiles = random_tiles(1)
    keep = np.ones((1, 100), bool)
    keep[0, :50] = False
    whole, half = classifier.explain(tiles), classifier.explain(tiles, keep)
    assert np.abs(whole.logits - half.logits).max() > 1e-6
    assert (half.rollout[0, :5] == 0).all() and (half.attention[..., :5, :] == 0).all()


def test_a_network_without_tokens_gives_evidence_and_empty_maps_for_the_rest(tokenless_artifact):
    classifier = open_classifier(tokenless_artifact, device="cpu")
    m = classifier.manifest
    assert (m.layers, m.heads, m.maps.evidence, m.maps.removal) == (0, 0, "exact", "pixels")
    tiles = random_tiles(2)
    explained = classifier.explain(tiles)
    assert explained.attention.shape == (2, 0, 0, 10, 10) and explained.rollout.shape == (2, 0, 0)
    assert explained.evidence.shape == (2, len(m.classes), 10, 10)
    keep = np.ones((2, 100), bool)
    keep[1, :50] = False
    half = classifier.explain(tiles, keep)
    np.testing.assert_array_equal(half.logits[0], explained.logits[0])
    assert np.abs(half.logits[1] - explained.logits[1]).max() > 1e-4


def test_maps_that_the_graph_does_not_give_must_not_be_promised(tokenless_artifact, tmp_path):
    for path in tokenless_artifact.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    content = json.loads((tmp_path / MANIFEST).read_text())
    content["maps"]["methods"] = ["attention", "rollout", "evidence", "occlusion"]
    (tmp_path / MANIFEST).write_text(json.dumps(content))
    with pytest.raises(CorruptArtifact, match="does not take tiles"):
        open_classifier(tmp_path, device="cpu")


def test_the_reference_is_read_where_there_is_one(artifact):
    assert open_classifier(artifact, device="cpu").reference is not None
    content = json.loads((artifact / MANIFEST).read_text())
    content["files"] = [file for file in content["files"] if file["role"] != "reference"]
    (artifact / "reference.npz").unlink()
    (artifact / MANIFEST).write_text(json.dumps(content))
    with pytest.raises(CorruptArtifact, match="no file of role reference"):
        open_classifier(artifact, device="cpu")
    content["gate"]["max_distance"] = None
    (artifact / MANIFEST).write_text(json.dumps(content))
    assert open_classifier(artifact, device="cpu").reference is None


@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_the_same_tile_gets_the_same_digits_every_time(tiny_artifact, precision):
    classifier = open_classifier(tiny_artifact, device="cpu", precision=precision)
    first, *rest = (classifier.predict(random_tiles(1)).probabilities for _ in range(5))
    for answer in rest:
        np.testing.assert_array_equal(answer, first)


def test_the_golden_tile_must_be_answered_as_written(artifact):
    content = json.loads((artifact / MANIFEST).read_text())
    content["golden"]["probabilities"] = content["golden"]["probabilities"][::-1]
    (artifact / MANIFEST).write_text(json.dumps(content))
    with pytest.raises(CorruptArtifact, match=r"golden tile is answered wrongly by predict in fp32 on cpu: expected"):
        open_classifier(artifact, device="cpu")


def test_a_gpu_that_answers_the_golden_tile_wrongly_is_unfit_and_the_artefact_whole(artifact, monkeypatch):
    monkeypatch.setattr("model.session.run_bound", lambda session, inputs: session.run(None, inputs))
    classifier = open_classifier(artifact, device="cpu")
    golden = classifier.manifest.golden
    wrong = golden.model_copy(update={"probabilities": golden.probabilities[::-1]})
    manifest = classifier.manifest.model_copy(update={"golden": wrong})
    with pytest.raises(DeviceUnavailable, match="answered wrongly by predict in fp32 on cuda"):
        check_golden(replace(classifier, device="cuda", manifest=manifest), load_golden(artifact, manifest))


def sign(folder):
    """Lets the manifest list the files as they are."""
    content = json.loads((folder / MANIFEST).read_text())
    for file in content["files"]:
        file["sha256"] = digest(folder / file["path"])
    (folder / MANIFEST).write_text(json.dumps(content))


def encode_png(width, height):
    buffer = io.BytesIO()
    Image.new("RGB", (width, height)).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("name", "content", "complaint"),
    [
        ("predict.onnx", b"", "not a graph"),
        ("explain.onnx", b"rubbish", "not a graph"),
        ("golden.png", b"rubbish", "no picture"),
        ("golden.png", encode_png(150, 151), "the manifest means"),
    ],
)
def test_a_file_that_was_listed_damaged_is_refused_as_well(artifact, name, content, complaint):
    (artifact / name).write_bytes(content)
    sign(artifact)
    with pytest.raises(CorruptArtifact, match=complaint):
        open_classifier(artifact, device="cpu")


@pytest.mark.parametrize("key", ["grid", "layers", "heads", "feature_width"])
def test_sizes_that_the_graphs_do_not_have_are_refused(artifact, key):
    content = json.loads((artifact / MANIFEST).read_text())
    content[key] = 5 if key == "grid" else content[key] + 1
    (artifact / MANIFEST).write_text(json.dumps(content))
    with pytest.raises(CorruptArtifact, match="manifest"):
        open_classifier(artifact, device="cpu")


def test_a_precision_that_was_not_exported_is_refused(artifact):
    with pytest.raises(CorruptArtifact, match="no fp16 graphs, only"):
        open_classifier(artifact, device="cpu", precision="fp16")


@pytest.mark.skipif(has_nvidia_driver(), reason="there is a GPU here")
@pytest.mark.filterwarnings("ignore:Specified provider")
def test_cuda_without_a_gpu_is_refused_and_never_silently_the_cpu(tiny_artifact):
    with pytest.raises(DeviceUnavailable, match="TISSUE_DEVICE=cpu"):
        open_classifier(tiny_artifact, device="cuda")


@pytest.mark.skipif(has_nvidia_driver(), reason="there is a GPU here")
@pytest.mark.filterwarnings("ignore:Specified provider")
def test_a_driver_without_its_libraries_leaves_the_choice_to_the_cpu_and_says_so(tiny_artifact, monkeypatch, caplog):
    monkeypatch.setattr("model.session.has_nvidia_driver", lambda: True)
    assert open_classifier(tiny_artifact).device == "cpu"
    assert "pip install 'tissue[cuda]'" in caplog.text


def fail_as_a_full_gpu(*given, **options):
    raise ort.capi.onnxruntime_pybind11_state.Fail("CUDA failure 2: out of memory")


@pytest.mark.parametrize("full", ["ort.preload_dlls", "run_bound"])
def test_a_gpu_that_fails_leaves_the_choice_to_the_cpu_and_is_not_taken_for_damage(
    tiny_artifact, monkeypatch, caplog, full
):
    """The first fails as its session opens, the second when it is asked."""
    monkeypatch.setattr("model.session.has_nvidia_driver", lambda: True)
    if full == "run_bound":
        monkeypatch.setattr("model.session.open_cuda_session", lambda path, threads, cuda: open_session(path, threads))
    monkeypatch.setattr(f"model.session.{full}", fail_as_a_full_gpu)
    assert open_classifier(tiny_artifact).device == "cpu"
    assert "out of memory" in caplog.text and "TISSUE_DEVICE=cpu" in caplog.text


@pytest.mark.gpu
@pytest.mark.skipif(not has_nvidia_driver(), reason="no NVIDIA driver here")
def test_a_gpu_answers_as_the_cpu_does(tiny_artifact):
    cpu, gpu = (open_classifier(tiny_artifact, device=device) for device in ("cpu", "cuda"))
    tiles = random_tiles(3)
    assert gpu.device == "cuda"
    # Tighter than TF32 would be.
    np.testing.assert_allclose(gpu.predict(tiles).probabilities, cpu.predict(tiles).probabilities, atol=1e-4)
    np.testing.assert_allclose(gpu.explain(tiles).rollout, cpu.explain(tiles).rollout, atol=1e-4)


def test_the_serving_side_never_imports_torch():
    code = "import sys, app.main, model.pixels, model.artifact, model.session; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
