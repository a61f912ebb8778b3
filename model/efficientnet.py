"""The first stages of EfficientNet-Lite0 (Tan and Le, arXiv 1905.11946; without squeeze-and-excitation, with ReLU6).

They stand before the transformer as in the hybrid of the ViT paper (section 3.1), so that weights learnt from millions
of photographs can do what 179 tiles can't teach: edges, spots and textures.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

CELL_PX = 16  # four strides of 2
# For each stage: blocks, kernel, stride, how much wider inside, channels out. The published network has two more,
# which would halve the grid again.
STAGES = ((1, 3, 1, 1, 16), (2, 3, 2, 6, 24), (2, 5, 2, 6, 40), (3, 3, 2, 6, 80), (3, 5, 1, 6, 112))
STEM_CHANNELS = 32
EPS = 1e-3  # as it was trained


class Enlarge(nn.Module):
    """Bilinear, as `F.interpolate`, by sums of neighbours whose weights are constants.

    ONNX Runtime's own operator computes them at every call, in float32 from places of up to 150 px: what it gives is
    off by 2e-5, and the features that follow by 1e-4.
    """

    lower: Tensor
    upper: Tensor
    share: Tensor

    def __init__(self, side_px: int, to_px: int) -> None:
        super().__init__()
        place = ((torch.arange(to_px, dtype=torch.float64) + 0.5) * side_px / to_px - 0.5).clamp(0, side_px - 1)
        lower = place.floor().long()  # (to_px,), as the next two
        self.register_buffer("lower", lower, persistent=False)
        self.register_buffer("upper", (lower + 1).clamp(max=side_px - 1), persistent=False)
        self.register_buffer("share", (place - lower).float(), persistent=False)  # of the upper neighbour

    def forward(self, x: Tensor) -> Tensor:
        return self.enlarge_rows(self.enlarge_rows(x).mT).mT

    def enlarge_rows(self, x: Tensor) -> Tensor:
        share = self.share[:, None]
        return x.index_select(2, self.lower) * (1 - share) + x.index_select(2, self.upper) * share


class HalvingPad(nn.Module):
    """For a stride of 2: on an even side kernels can't be centred on their cells, so they lean half a pixel aside."""

    def __init__(self, kernel: int, leans_left: bool = False) -> None:
        super().__init__()
        less, more = (kernel - 2) // 2, (kernel - 1) // 2
        left, right = (more, less) if leans_left else (less, more)
        self.sides = (left, right, left, right)

    def forward(self, x: Tensor) -> Tensor:
        return F.pad(x, self.sides)


def convolve(x: Tensor, conv: nn.Conv2d, norm: nn.BatchNorm2d) -> Tensor:
    """A norm that learns nothing is part of its convolution: fewer ways through memory, where most of the time goes."""
    if norm.training:
        normed: Tensor = norm(conv(x))
        return normed
    assert norm.running_mean is not None and norm.running_var is not None
    gain = norm.weight / (norm.running_var + norm.eps).sqrt()
    weight, bias = conv.weight * gain.view(-1, 1, 1, 1), norm.bias - norm.running_mean * gain
    return F.conv2d(x, weight, bias, conv.stride, conv.padding, conv.dilation, conv.groups)


class InvertedResidual(nn.Module):
    """Widen, look around channel by channel, narrow again (MobileNetV2, arXiv 1801.04381)."""

    def __init__(self, channels: int, out: int, kernel: int, stride: int, widening: int, leans_left: bool) -> None:
        super().__init__()
        wide = channels * widening
        self.is_residual = stride == 1 and channels == out
        self.expand = nn.Conv2d(channels, wide, 1, bias=False) if widening > 1 else None
        self.expand_norm = nn.BatchNorm2d(wide, eps=EPS) if widening > 1 else None
        half = (kernel - 1) // 2
        self.pad = HalvingPad(kernel, leans_left) if stride == 2 else None
        self.depthwise = nn.Conv2d(wide, wide, kernel, stride, padding=0 if self.pad else half, groups=wide, bias=False)
        self.depthwise_norm = nn.BatchNorm2d(wide, eps=EPS)
        self.narrow = nn.Conv2d(wide, out, 1, bias=False)
        self.narrow_norm = nn.BatchNorm2d(out, eps=EPS)

    def forward(self, x: Tensor) -> Tensor:
        y = x
        if self.expand is not None and self.expand_norm is not None:
            y = F.relu6(convolve(y, self.expand, self.expand_norm), inplace=True)
        if self.pad is not None:
            y = self.pad(y)
        y = F.relu6(convolve(y, self.depthwise, self.depthwise_norm), inplace=True)
        y = convolve(y, self.narrow, self.narrow_norm)
        return x + y if self.is_residual else y


class EfficientStem(nn.Module):
    """Images in [-1, 1] enter, a token for each of G x G cells leaves."""

    def __init__(self, side_px: int, grid: int, width: int) -> None:
        super().__init__()
        self.enlarge = Enlarge(side_px, grid * CELL_PX)
        self.pad = HalvingPad(3)
        self.conv = nn.Conv2d(3, STEM_CHANNELS, 3, stride=2, bias=False)
        self.norm = nn.BatchNorm2d(STEM_CHANNELS, eps=EPS)
        blocks: list[nn.Module] = []
        channels = STEM_CHANNELS
        cell_px = 2
        for number, kernel, stride, widening, out in STAGES:
            for i in range(number):
                step = stride if i == 0 else 1
                cell_px *= step
                # 1/2, 1 and 2 px right, as published, but 4 px left: so token i is patch i, to half a pixel
                blocks.append(InvertedResidual(channels, out, kernel, step, widening, leans_left=cell_px == CELL_PX))
                channels = out
        self.blocks = nn.Sequential(*blocks)
        self.proj = nn.Conv2d(channels, width, 1)

    def forward(self, images: Tensor) -> Tensor:
        x = self.enlarge(images)  # (N, 3, 16G, 16G)
        x = x.contiguous(memory_format=torch.channels_last)  # twice as fast where convolutions are narrow
        x = F.relu6(convolve(self.pad(x), self.conv, self.norm), inplace=True)  # (N, 32, 8G, 8G)
        patches: Tensor = self.proj(self.blocks(x))  # (N, D, G, G)
        return patches.flatten(2).transpose(1, 2)  # (N, G*G, D)
