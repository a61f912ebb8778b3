import copy

import pytest
import torch
from torch import nn

from model.network import build
from model.vit import ViTConfig
from training.averaging import average_with_start, measure_norms
from training.checkpoint import save

CONFIG = ViTConfig(tile_px=60, stem="efficientnet", width=24, layers=1, heads=2, pool="both")


@pytest.fixture
def net() -> nn.Module:
    torch.manual_seed(0)
    return build(CONFIG, classes=3).eval()


def test_what_the_start_has_is_averaged_and_the_rest_stays(net, tmp_path):
    torch.manual_seed(1)
    start = build(CONFIG, classes=3).state_dict()
    old = {name: tensor for name, tensor in start.items() if name.startswith("patch_embed.blocks")}
    save({"weights": old}, tmp_path / "start.pt")
    before = copy.deepcopy(net.state_dict())
    average_with_start(net, tmp_path / "start.pt", share=0.25)
    for name, tensor in net.state_dict().items():
        expected = torch.lerp(before[name], start[name], 0.25) if name in old and tensor.is_floating_point() else None
        torch.testing.assert_close(tensor, before[name] if expected is None else expected)


def test_norms_are_those_of_the_images_but_for_frozen_layers(net):
    images = torch.rand(6, 3, 60, 60)
    frozen = ["patch_embed.conv", "patch_embed.norm", "patch_embed.blocks.0."]
    before = copy.deepcopy(net.state_dict())
    measure_norms(net, images.split(3), frozen)
    assert not any(module.training for module in net.modules())
    after = net.state_dict()
    assert torch.equal(after["patch_embed.norm.running_mean"], before["patch_embed.norm.running_mean"])

    seen: list[torch.Tensor] = []
    block = net.get_submodule("patch_embed.blocks.1")
    block.register_forward_pre_hook(lambda module, given: seen.append(block.expand(given[0])))
    with torch.no_grad():
        net(images)
    mean = seen[0].mean(dim=(0, 2, 3))
    torch.testing.assert_close(after["patch_embed.blocks.1.expand_norm.running_mean"], mean, rtol=1e-3, atol=1e-5)
    learnt = {name for name, parameter in net.named_parameters() if "norm" not in name}
    assert all(torch.equal(after[name], before[name]) for name in learnt)
