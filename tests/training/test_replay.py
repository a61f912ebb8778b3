import onnx
import pytest
import torch
from torch import nn

from model.graph import PredictGraph, Prediction
from model.vit import ViT, ViTConfig
from training.export import trace
from training.replay import OPERATORS, Replay, Unreplayable


def write_graph(module, folder):
    path = folder / "predict.onnx"
    tiles = torch.zeros(2, 30, 30, 3, dtype=torch.uint8)
    onnx.save(trace(module, {"tiles": tiles}, Prediction._fields), path)
    return path


class Mixed(nn.Module):
    """What convolutional and hybrid networks are made of, beside what a transformer has."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, stride=2, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.head = nn.Linear(8, 4)

    def forward(self, tiles):
        x = torch.relu(self.norm(self.conv(tiles.permute(0, 3, 1, 2).float() / 255)))
        x = nn.functional.max_pool2d(x, 3, 2, 1)
        gate = (x - x.mean(dim=(2, 3), keepdim=True)).pow(2)
        x = x * torch.sigmoid(gate / (gate.sum(dim=(2, 3), keepdim=True) + 0.1).sqrt())
        features = nn.functional.avg_pool2d(x, 2).mean(dim=(2, 3))
        logits = self.head(features)
        return Prediction(logits, logits.softmax(dim=1), features)


def test_a_shipped_graph_gives_its_logits_with_gradients(tiny_artifact):
    replay = Replay(tiny_artifact / "predict.onnx")  # compares itself with ONNX Runtime
    tiles = torch.rand(1, 150, 150, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float32) * 255
    tiles.requires_grad_()
    replay(tiles)[0, 1].backward()
    gradient = tiles.grad
    assert gradient is not None and gradient.abs().max() > 0
    step = gradient / gradient.norm()
    with torch.no_grad():
        rise = (replay(tiles + 4 * step) - replay(tiles - 4 * step))[0, 1] / 8
    assert rise == pytest.approx(gradient.norm().item(), rel=0.05)


@pytest.mark.parametrize("stem", ["conv", "efficientnet"])
@pytest.mark.parametrize("pool", ["mean", "both"])
def test_every_kind_of_head_and_the_convolutional_stems(pool, stem, tmp_path):
    torch.manual_seed(0)
    config = ViTConfig(tile_px=30, width=32, layers=1, heads=2, stem=stem, pool=pool, early_share=0.5, colour_share=0.2)
    vit = ViT(config, 3).eval()
    vit.colour_head.table.uniform_()
    nn.init.normal_(vit.head.weight)
    nn.init.normal_(vit.early_head.weight)
    assert Replay(write_graph(PredictGraph(vit, 1.0), tmp_path))(torch.zeros(3, 30, 30, 3)).shape == (3, 3)


def test_convolutional_networks_are_replayed_as_well(tmp_path):
    torch.manual_seed(0)
    module = Mixed().eval()
    nn.init.normal_(module.norm.bias)
    assert Replay(write_graph(module, tmp_path))(torch.zeros(1, 30, 30, 3)).shape == (1, 4)


def test_an_operator_nobody_wrote_is_named(tiny_artifact, tmp_path):
    proto = onnx.load(tiny_artifact / "predict.onnx")
    next(node for node in proto.graph.node if node.op_type == "Softmax").op_type = "Hardmax"
    onnx.save(proto, tmp_path / "predict.onnx")
    with pytest.raises(Unreplayable, match=r"doesn't know: Hardmax"):
        Replay(tmp_path / "predict.onnx")


def test_a_replay_that_computes_something_else_is_refused(tiny_artifact, monkeypatch):
    monkeypatch.setitem(OPERATORS, "Softmax", lambda x, axis=-1: x.sigmoid())
    with pytest.raises(Unreplayable, match="differ by"):
        Replay(tiny_artifact / "predict.onnx")
