"""Three small networks without tokens, to compare with: PoolFormer, ConvMixer and a ResNet.

Each ends in cells on the patch grid, whose mean is what the head reads. So the class-activation map is exact: with the
class's bias the cells' parts add up to the logit.
Letters: N batch, S tile side, G = S/15, D width of the last cells, K classes.
"""

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn

from model.layers import PATCH_PX, Residual, Scaling


@dataclass(frozen=True)
class PoolFormerConfig:
    architecture: Literal["poolformer"] = "poolformer"
    tile_px: int = 150
    widths: tuple[int, int] = (48, 224)  # at 50 x 50 and at 10 x 10 cells
    blocks: tuple[int, int] = (1, 6)
    mlp_ratio: int = 4
    mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    std: tuple[float, float, float] = (0.5, 0.5, 0.5)

    def __post_init__(self) -> None:
        check_tile(self.tile_px)

    @property
    def grid(self) -> int:
        return self.tile_px // PATCH_PX

    @property
    def feature_width(self) -> int:
        return self.widths[-1]


@dataclass(frozen=True)
class ConvMixerConfig:
    architecture: Literal["convmixer"] = "convmixer"
    tile_px: int = 150
    width: int = 512
    blocks: int = 8
    kernel: int = 5  # cells that the mixing over places reaches
    mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    std: tuple[float, float, float] = (0.5, 0.5, 0.5)

    def __post_init__(self) -> None:
        check_tile(self.tile_px)

    @property
    def grid(self) -> int:
        return self.tile_px // PATCH_PX

    @property
    def feature_width(self) -> int:
        return self.width


@dataclass(frozen=True)
class ResNetConfig:
    architecture: Literal["resnet"] = "resnet"
    tile_px: int = 150
    widths: tuple[int, int, int, int] = (32, 64, 160, 256)  # the first two at 50 x 50, the others at 10 x 10 cells
    blocks: tuple[int, int, int, int] = (1, 1, 2, 1)
    mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    std: tuple[float, float, float] = (0.5, 0.5, 0.5)

    def __post_init__(self) -> None:
        check_tile(self.tile_px)

    @property
    def grid(self) -> int:
        return self.tile_px // PATCH_PX

    @property
    def feature_width(self) -> int:
        return self.widths[-1]


def check_tile(tile_px: int) -> None:
    if tile_px % PATCH_PX:
        raise ValueError(f"the grid has a cell for every 15 px, so tile_px must be a multiple of 15, not {tile_px}")


class Output(NamedTuple):
    logits: Tensor  # (N, K)
    features: Tensor  # (N, D), the mean of the cells
    cells: Tensor  # (N, D, G, G)


class Ending(nn.Module):
    """From the last cells to the logits, the same for all three."""

    def __init__(self, width: int, classes: int) -> None:
        super().__init__()
        self.head = nn.Linear(width, classes)
        nn.init.zeros_(self.head.weight)  # every class equally likely before the first step
        nn.init.zeros_(self.head.bias)

    def forward(self, cells: Tensor) -> Output:
        features = cells.mean(dim=(2, 3))  # (N, D)
        return Output(self.head(features), features, cells)


# -- PoolFormer ----------------------------------------------------------------------------------------------------


class PoolBlock(nn.Module):
    """A transformer's block whose attention is a mean over 3 x 3 neighbours (Yu et al., arXiv 2111.11418)."""

    def __init__(self, width: int, mlp_ratio: int) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(1, width)
        self.norm2 = nn.GroupNorm(1, width)
        self.fc1 = nn.Conv2d(width, mlp_ratio * width, kernel_size=1)
        self.fc2 = nn.Conv2d(mlp_ratio * width, width, kernel_size=1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm1(x)
        x = x + F.avg_pool2d(y, 3, stride=1, padding=1, count_include_pad=False) - y
        mixed: Tensor = self.fc2(F.gelu(self.fc1(self.norm2(x))))
        return x + mixed


class PoolFormer(nn.Module):
    def __init__(self, config: PoolFormerConfig, classes: int) -> None:
        super().__init__()
        self.config = config
        self.scaling = Scaling(config.mean, config.std)
        fine, coarse = config.widths
        self.stem = nn.Conv2d(3, fine, kernel_size=7, stride=3, padding=2)
        self.fine = nn.Sequential(*(PoolBlock(fine, config.mlp_ratio) for _ in range(config.blocks[0])))
        self.down = nn.Conv2d(fine, coarse, kernel_size=7, stride=5, padding=1)
        self.coarse = nn.Sequential(*(PoolBlock(coarse, config.mlp_ratio) for _ in range(config.blocks[1])))
        self.norm = nn.GroupNorm(1, coarse)
        self.ending = Ending(coarse, classes)

    def forward(self, images: Tensor) -> Output:
        x = self.fine(self.stem(self.scaling(images)))  # (N, 48, S/3, S/3)
        out: Output = self.ending(self.norm(self.coarse(self.down(x))))
        return out


# -- ConvMixer -----------------------------------------------------------------------------------------------------


class MixerBlock(nn.Module):
    """Each channel over its places, then each place over its channels (Trockman & Kolter, arXiv 2201.09792)."""

    def __init__(self, width: int, kernel: int) -> None:
        super().__init__()
        self.places = nn.Conv2d(width, width, kernel, padding="same", groups=width)
        self.norm1 = nn.BatchNorm2d(width)
        self.channels = nn.Conv2d(width, width, kernel_size=1)
        self.norm2 = nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.norm1(F.gelu(self.places(x)))
        mixed: Tensor = self.norm2(F.gelu(self.channels(x)))
        return mixed


class ConvMixer(nn.Module):
    def __init__(self, config: ConvMixerConfig, classes: int) -> None:
        super().__init__()
        self.config = config
        self.scaling = Scaling(config.mean, config.std)
        self.embed = nn.Conv2d(3, config.width, kernel_size=PATCH_PX, stride=PATCH_PX)
        self.norm = nn.BatchNorm2d(config.width)
        self.blocks = nn.Sequential(*(MixerBlock(config.width, config.kernel) for _ in range(config.blocks)))
        self.ending = Ending(config.width, classes)

    def forward(self, images: Tensor) -> Output:
        x = self.norm(F.gelu(self.embed(self.scaling(images))))  # (N, D, G, G)
        out: Output = self.ending(self.blocks(x))
        return out


# -- ResNet --------------------------------------------------------------------------------------------------------


class ResNet(nn.Module):
    def __init__(self, config: ResNetConfig, classes: int) -> None:
        super().__init__()
        self.config = config
        self.scaling = Scaling(config.mean, config.std)
        self.stem = nn.Conv2d(3, config.widths[0], kernel_size=7, stride=3, padding=2, bias=False)
        self.norm = nn.BatchNorm2d(config.widths[0])
        blocks, inside = [], config.widths[0]
        for width, count, stride in zip(config.widths, config.blocks, (1, 1, 5, 1), strict=True):
            for step in (stride, *[1] * (count - 1)):
                blocks.append(Residual(inside, width, step, bare=inside == width and step == 1))
                inside = width
        self.blocks = nn.Sequential(*blocks)
        self.ending = Ending(inside, classes)

    def forward(self, images: Tensor) -> Output:
        x = F.relu(self.norm(self.stem(self.scaling(images))))  # (N, 32, S/3, S/3)
        out: Output = self.ending(self.blocks(x))
        return out
