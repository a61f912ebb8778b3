import subprocess

import numpy as np
import onnx
import pytest
import torch

from model.artifact import read_manifest
from model.convnets import PoolFormerConfig
from model.msht import MSHTConfig
from model.network import build
from model.vit import ViT, ViTConfig
from training import export as exporting
from training.config import Card
from training.export import NotAnArtefact, ParityFailed, check_parity, export, versions, write_graphs
from training.findings import add_reference, unmeasured
from training.fit import predict_with_features, read_tiles
from training.run import complete_card

SMALL = ViTConfig(width=32, layers=2, heads=2, pool="both", early_share=0.5, colour_share=0.2)


@pytest.fixture(scope="module")
def tiles(small_fit):
    return read_tiles(small_fit)


@pytest.fixture(scope="module")
def vit():
    torch.manual_seed(0)
    vit = ViT(SMALL, 3).eval()
    torch.nn.init.normal_(vit.head.weight)
    vit.colour_head.table.uniform_()
    return vit


@pytest.fixture(scope="module")
def findings(vit, tiles):
    return add_reference(unmeasured(tiles), tiles, predict_with_features(vit, tiles.tiles)[1])


@pytest.fixture(scope="module")
def graphs(vit, tmp_path_factory):
    folder = tmp_path_factory.mktemp("graphs")
    write_graphs(vit, 1.0, folder)
    return folder


def test_both_graphs_share_one_weights_file_and_name_no_path(graphs):
    assert sorted(p.name for p in graphs.iterdir()) == ["explain.onnx", "predict.onnx", "weights.bin"]
    parameters = 4 * sum(tensor.numel() for tensor in ViT(SMALL, 3).state_dict().values())
    # evidence needs some matrices the other way round as well; two copies of all would be twice the size
    assert (graphs / "weights.bin").stat().st_size < 1.3 * parameters
    for name in ("predict.onnx", "explain.onnx"):
        assert b".py" not in (graphs / name).read_bytes()


def test_graphs_are_plain_softmax_attention_of_opset_20(graphs):
    proto = onnx.load(graphs / "explain.onnx")
    kinds = {node.op_type for node in proto.graph.node}
    assert "Softmax" in kinds and "Attention" not in kinds
    assert [o.version for o in proto.opset_import if o.domain == ""] == [20]
    assert [i.name for i in proto.graph.input] == ["tiles", "keep"]


def test_the_same_network_gives_the_same_bytes(vit, graphs, tmp_path):
    write_graphs(vit, 1.0, tmp_path)
    for path in graphs.iterdir():
        assert (tmp_path / path.name).read_bytes() == path.read_bytes()


def test_torch_and_both_graphs_agree_on_every_tile(vit, graphs, tiles):
    check_parity(vit, 1.0, tiles.tiles, graphs)


def test_graphs_of_another_network_do_not_pass(vit, graphs, tiles):
    other = ViT(vit.config, 3).eval()
    other.load_state_dict(vit.state_dict())
    with torch.no_grad():
        other.head.bias[0] += 0.02  # counts half: the early head has the other
    with pytest.raises(ParityFailed, match=r"differs from torch in logits by 1\.0e-02 \(allowed 1e-04\)"):
        check_parity(other, 1.0, tiles.tiles, graphs)


def test_nothing_is_written_and_nothing_replaced_when_parity_fails(vit, tiles, findings, tmp_path, monkeypatch):
    (tmp_path / "artifact").mkdir()
    (tmp_path / "artifact" / "manifest.json").write_text("kept")
    monkeypatch.setattr(exporting, "LOGIT_TOLERANCE", -1.0)
    card = complete_card(Card(), tiles.classes)
    with pytest.raises(ParityFailed, match="nothing was written"):
        export(vit, "x", card, findings, 0.495, tiles.tiles, tmp_path / "artifact")
    assert [p.name for p in tmp_path.rglob("*") if p.is_file()] == ["manifest.json"]
    assert (tmp_path / "artifact" / "manifest.json").read_text() == "kept"


def test_an_artefact_that_was_there_is_replaced_whole(vit, tiles, findings, tmp_path):
    (tmp_path / "artifact").mkdir()
    (tmp_path / "artifact" / "manifest.json").write_text("{}")
    (tmp_path / "artifact" / "stale.onnx").write_text("old")
    (tmp_path / "artifact.old").mkdir()  # of an export that was killed
    (tmp_path / "artifact.old" / "stale.onnx").write_text("older")
    card = complete_card(Card(int8=False), tiles.classes)
    manifest = export(vit, "x", card, findings, 0.495, tiles.tiles, tmp_path / "artifact")
    assert not (tmp_path / "artifact" / "stale.onnx").exists()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["artifact", "artifact.old"]
    assert read_manifest(tmp_path / "artifact") == manifest
    assert np.isclose(sum(manifest.golden.probabilities), 1)


@pytest.mark.parametrize("name", ["thesis", "thesis/thesis.txt"])
def test_what_is_no_artefact_is_not_replaced(vit, tiles, findings, tmp_path, name):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "thesis.txt").write_text("three years")
    with pytest.raises(NotAnArtefact, match=rf"{name} is there and is no artefact, .* name a new folder"):
        export(vit, "x", complete_card(Card(), tiles.classes), findings, 0.495, tiles.tiles, tmp_path / name)
    assert [p.name for p in tmp_path.rglob("*")] == ["thesis", "thesis.txt"]


def test_an_empty_folder_may_become_an_artefact(tmp_path):
    exporting.refuse_other_folder(tmp_path)
    exporting.refuse_other_folder(tmp_path / "new")


def test_the_commit_is_that_of_the_code_wherever_the_user_is(tmp_path, monkeypatch):
    subprocess.run(["git", "init", "--quiet", tmp_path], check=True)
    here = versions()["commit"].removesuffix("-dirty")
    monkeypatch.chdir(tmp_path)
    assert versions()["commit"].removesuffix("-dirty") == here != "unknown"


OTHERS = [
    MSHTConfig(channels=(8, 8, 8, 16), width=16, heads=2, pool="both"),
    PoolFormerConfig(widths=(8, 16), blocks=(1, 1)),
]


@pytest.mark.parametrize("config", OTHERS, ids=lambda config: config.architecture)
def test_networks_of_other_kinds_pass_the_same_gate(config, tiles, tmp_path):
    torch.manual_seed(0)
    net = build(config, 3).eval()
    torch.nn.init.normal_(net.get_parameter("head.weight" if config.architecture == "msht" else "ending.head.weight"))
    write_graphs(net, 1.0, tmp_path)
    check_parity(net, 1.0, tiles.tiles[:8], tmp_path)
