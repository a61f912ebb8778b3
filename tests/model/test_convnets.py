import pytest
import torch
from torch import nn

from model.convnets import ConvMixer, ConvMixerConfig, PoolFormer, PoolFormerConfig, ResNet, ResNetConfig

NETWORKS = [
    PoolFormer(PoolFormerConfig(tile_px=60, widths=(8, 16), blocks=(1, 2)), 3),
    ConvMixer(ConvMixerConfig(tile_px=60, width=16, blocks=2, kernel=3), 3),
    ResNet(ResNetConfig(tile_px=60, widths=(8, 8, 16, 16), blocks=(1, 1, 2, 1)), 3),
]
each = pytest.mark.parametrize("net", [net.eval() for net in NETWORKS], ids=lambda net: type(net).__name__)


@each
def test_the_head_reads_the_mean_of_cells_on_the_patch_grid(net):
    out = net(torch.rand(2, 3, 60, 60))
    assert out.cells.shape == (2, 16, 4, 4)
    torch.testing.assert_close(out.features, out.cells.mean((2, 3)))
    assert (out.logits == 0).all()  # every class equally likely before the first step


@each
def test_an_image_is_answered_the_same_in_any_company(net):
    images = torch.rand(3, 3, 60, 60)
    torch.testing.assert_close(net(images).features[:1], net(images[:1]).features)


@each
def test_cells_are_centred_on_their_patches(net):
    """With mirrored kernels a mirrored image gives the mirrored cells: any shift of the grid would show."""
    for module in net.modules():
        if isinstance(module, nn.Conv2d):
            module.weight.data = module.weight.data + module.weight.data.flip(-1)
    images = torch.rand(1, 3, 60, 60)
    torch.testing.assert_close(net(images).cells.flip(-1), net(images.flip(-1)).cells, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ResNetConfig(tile_px=100), "multiple of 15"),
        (lambda: PoolFormerConfig(tile_px=160), "multiple of 15"),
        (lambda: ConvMixerConfig(tile_px=32), "multiple of 15"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
