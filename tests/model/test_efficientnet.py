import pytest
import torch
import torch.nn.functional as F
from torch import nn

from model.efficientnet import EfficientStem, Enlarge, convolve


def make_stem(side_px=160, grid=10):
    torch.manual_seed(0)
    return EfficientStem(side_px, grid, width=24).eval()


@pytest.mark.parametrize(("side_px", "to_px"), [(150, 160), (60, 64), (160, 160), (150, 80)])
def test_tiles_are_enlarged_as_torch_does_it(side_px, to_px):
    torch.manual_seed(0)
    images = torch.rand(2, 3, side_px, side_px, dtype=torch.float64)
    wanted = F.interpolate(images, (to_px, to_px), mode="bilinear", align_corners=False)
    torch.testing.assert_close(Enlarge(side_px, to_px)(images), wanted, atol=1e-6, rtol=0)


def test_a_norm_that_learns_nothing_is_part_of_its_convolution():
    torch.manual_seed(0)
    conv, norm = nn.Conv2d(4, 6, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(6)
    norm.train()(torch.randn(8, 6, 5, 5) * 3 + 1)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    images = torch.randn(2, 4, 9, 9)
    torch.testing.assert_close(convolve(images, conv, norm.eval()), norm(conv(images)), atol=1e-5, rtol=1e-5)
    norm.train()
    assert convolve(images, conv, norm).mean((0, 2, 3)).tolist() == pytest.approx(norm.bias.tolist(), abs=1e-5)


def test_what_tokens_see_lies_around_their_own_patches():
    stem = make_stem()
    for module in stem.modules():  # every path through the stem counted, so that no random weight hides one
        if isinstance(module, nn.Conv2d):
            nn.init.constant_(module.weight, 1 / module.weight[0].numel())
    pixels = torch.full((1, 3, 160, 160), 0.1, requires_grad=True)
    tokens = stem(pixels).unflatten(1, (10, 10))[0]  # (G, G, D)
    (gradient,) = torch.autograd.grad(tokens[4:6, 4:6].sum(), pixels)  # the four around the middle
    seen = gradient.sum((0, 1))  # (160, 160)
    place = torch.arange(160.0)
    for line in (seen.sum(0), seen.sum(1)):
        assert (line @ place / line.sum()).item() == pytest.approx(79.5, abs=1)


def test_tiles_of_any_side_become_its_grid():
    assert make_stem(60, grid=4)(torch.rand(2, 3, 60, 60)).shape == (2, 16, 24)


def test_its_blocks_are_those_of_the_paper():
    blocks = make_stem().blocks
    assert len(blocks) == 11
    assert [block.depthwise.kernel_size[0] for block in blocks] == [3, 3, 3, 5, 5, 3, 3, 3, 5, 5, 5]
    assert [block.narrow.out_channels for block in blocks] == [16, 24, 24, 40, 40, 80, 80, 80, 112, 112, 112]
    assert [block.is_residual for block in blocks] == [
        False,
        False,
        True,
        False,
        True,
        False,
        True,
        True,
        False,
        True,
        True,
    ]
    assert blocks[0].expand is None and blocks[4].expand.out_channels == 240


def test_a_block_that_learns_agrees_with_its_layers_one_after_the_other():
    block = make_stem().blocks[4].train()
    x = torch.randn(3, 40, 6, 6)
    y = F.relu6(block.expand_norm(block.expand(x)))
    y = F.relu6(block.depthwise_norm(block.depthwise(y)))
    torch.testing.assert_close(block(x), x + block.narrow_norm(block.narrow(y)))
