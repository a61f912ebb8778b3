import io
import warnings
from pathlib import Path

import numpy as np
import onnx
import pytest
from rich.console import Console
from typer import Exit

from benchmarks import gpu
from benchmarks.gpu import Graph, flops_per_image, fuse_attention, make_graphs, tabulate_engine, time_call
from benchmarks.servers import ARTIFACT
from model.artifact import read_manifest
from model.session import has_nvidia_driver, open_session

TILES = np.random.default_rng(0).integers(0, 256, (2, 150, 150, 3), np.uint8)


@pytest.mark.skipif(has_nvidia_driver(), reason="there is a GPU")
def test_without_a_gpu_it_says_so_and_ends(monkeypatch):
    printed = io.StringIO()
    monkeypatch.setattr(gpu, "out", Console(file=printed, width=200))
    with pytest.raises(Exit) as refusal:
        gpu.main()
    assert refusal.value.exit_code == 1
    assert "no NVIDIA driver is here" in printed.getvalue()


def test_all_graphs_answer_as_the_shipped_one(tiny_artifact, tmp_path):
    manifest = read_manifest(tiny_artifact)
    expected = answer(tiny_artifact / manifest.file("predict", "fp32").path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the converter, about values too small for fp16
        graphs = make_graphs(tiny_artifact, manifest, tmp_path)
    assert [(graph.precision, graph.attention) for graph in graphs] == [
        ("fp32", "plain"), ("tf32", "plain"), ("fp16", "plain"),
        ("fp32", "fused"), ("tf32", "fused"), ("fp16", "fused"),
    ]  # fmt: skip
    for graph in graphs:
        assert np.abs(answer(graph.path) - expected).max() < (1e-2 if graph.precision == "fp16" else 1e-5)
    kinds = [node.op_type for node in onnx.load(tmp_path / "fused.fp16.onnx").graph.node]
    assert kinds.count("Attention") == manifest.layers


def test_attention_that_is_not_there_is_not_fused():
    x, y = (onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [2, 3]) for name in "xy")
    graph = onnx.helper.make_graph([onnx.helper.make_node("Softmax", ["x"], ["y"])], "lone", [x], [y])
    assert fuse_attention(onnx.helper.make_model(graph)) == 0


def answer(path: Path) -> np.ndarray:
    found: np.ndarray = open_session(path, threads=1).run(["probabilities"], {"tiles": TILES})[0]
    return found


def test_the_work_of_an_image_is_counted_from_the_sizes():
    manifest = read_manifest(ARTIFACT)
    assert 0.6e9 < flops_per_image(manifest) < 0.7e9  # 0.25e9 of the stem; width 192, 4 layers, 101 tokens


def test_shares_are_of_what_was_measured_or_said_not_to_be():
    graph = Graph("fp16", "fused", Path("x"))
    speeds: dict[tuple[Graph, gpu.Way], list[float | str]] = {(graph, "captured"): [1000.0, 50_000.0, "failed"]}
    (row,) = tabulate_engine(speeds, flops=1e9, matmul=500e12)
    assert row == ["fp16", "fused", "captured", "1,000", "50,000", "failed", "10.0%"]
    (row,) = tabulate_engine(speeds, flops=1e9, matmul=None)
    assert row[-1] == "not measured"


def test_a_call_is_timed_over_all_its_repetitions():
    calls = []
    seconds = time_call(lambda: calls.append(1), 0.01)
    assert 0 < seconds < 0.01 and len(calls) > gpu.WARM_UP_CALLS
