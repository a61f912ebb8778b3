"""MSHT, the multi-stage hybrid transformer of Zhang et al. (arXiv 2112.13513): anew from its description, and small.

A convolutional network looks at the tile in four stages. Four decoder blocks carry a class token and the patch tokens,
and block i lets stage i say where to look: queries and keys of its guided attention come from that stage alone, only
the values from the tokens. Differences to the paper: sizes, a grid of 10 x 10, a choice of what the head reads.
Letters: N batch, S tile side, G = S/15, T = 1 + G*G tokens, C channels of a stage, D width, H heads, K classes.
"""

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.layers import (
    PATCH_PX,
    DropPath,
    Mlp,
    Pooling,
    Residual,
    Scaling,
    attention_weights,
    initialise,
    pool,
    refuse_remainder,
    removal_bias,
    select,
)

STAGE_STRIDES = (1, 1, 5, 1)  # after the stem's 3: 50, 50, 10 and 10 cells a side on a tile of 150 px
POOLINGS = (5, 5, 1, 1)  # from a stage's cells to the grid of the tokens


@dataclass(frozen=True)
class MSHTConfig:
    architecture: Literal["msht"] = "msht"
    tile_px: int = 150
    channels: tuple[int, int, int, int] = (32, 64, 128, 192)  # of the four stages
    width: int = 128
    heads: int = 4
    mlp_ratio: int = 4
    pool: Pooling = "class"  # which tokens the head reads; the paper's reads the class token
    drop_path: float = 0.1
    mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    std: tuple[float, float, float] = (0.5, 0.5, 0.5)

    def __post_init__(self) -> None:
        if self.tile_px % PATCH_PX:
            raise ValueError(f"the stages stride by 3 and 5, so tile_px must be a multiple of 15, not {self.tile_px}")
        refuse_remainder("width", self.width, "heads", self.heads)

    @property
    def grid(self) -> int:
        return self.tile_px // PATCH_PX

    @property
    def layers(self) -> int:
        return len(self.channels)

    @property
    def feature_width(self) -> int:
        return 2 * self.width if self.pool == "both" else self.width


class Output(NamedTuple):
    logits: Tensor  # (N, K)
    features: Tensor  # (N, D) or (N, 2D)
    tokens: tuple[Tensor, ...]  # five of (N, T, D): as embedded, then after each block
    attentions: tuple[Tensor, ...]  # the guided ones, four of (N, H, T, T), empty unless asked for
    self_attentions: tuple[Tensor, ...]  # those of the tokens among themselves, likewise
    before_guidance: Tensor  # (N, T, D), what the last guided attention mixes


# -- the convolutional side ----------------------------------------------------------------------------------------


class Encoder(nn.Module):
    def __init__(self, config: MSHTConfig) -> None:
        super().__init__()
        first = config.channels[0]
        self.stem = nn.Conv2d(3, first, kernel_size=7, stride=3, padding=2, bias=False)
        self.norm = nn.BatchNorm2d(first)
        inside = (first, *config.channels[:-1])
        self.stages = nn.ModuleList(map(Residual, inside, config.channels, STAGE_STRIDES))

    def forward(self, images: Tensor) -> list[Tensor]:
        x = F.relu(self.norm(self.stem(images)))  # (N, C, S/3, S/3)
        stages = []
        for stage in self.stages:
            x = stage(x)
            stages.append(x)
        return stages


def emphasise(x: Tensor) -> Tensor:
    """Attention without parameters (SimAM, Yang et al., ICML 2021): a value far from its channel's mean counts more."""
    squared = (x - x.mean(dim=(2, 3), keepdim=True)).square()  # (N, C, h, w)
    variance = squared.sum(dim=(2, 3), keepdim=True) / (x.shape[2] * x.shape[3] - 1)
    return x * torch.sigmoid(squared / (4 * (variance + 1e-4)) + 0.5)


class Focus(nn.Module):
    """Two looks at one stage, on the grid of the tokens: the gaze keeps what stands out, the glance the average."""

    def __init__(self, channels: int, pooling: int, width: int) -> None:
        super().__init__()
        self.pooling = pooling
        self.gaze = nn.Conv2d(channels, width, kernel_size=1)
        self.glance = nn.Conv2d(channels, width, kernel_size=1)
        self.gaze_norm = nn.LayerNorm(width, eps=1e-6)
        self.glance_norm = nn.LayerNorm(width, eps=1e-6)

    def forward(self, stage: Tensor) -> tuple[Tensor, Tensor]:
        x = emphasise(stage)  # (N, C, h, h)
        gaze = to_tokens(self.gaze(F.max_pool2d(x, self.pooling)))
        glance = to_tokens(self.glance(F.avg_pool2d(x, self.pooling)))
        return self.gaze_norm(gaze), self.glance_norm(glance)  # both (N, G*G, D)


def to_tokens(cells: Tensor) -> Tensor:
    return cells.flatten(2).transpose(1, 2)  # (N, D, G, G) -> (N, G*G, D)


# -- the transformer's side ----------------------------------------------------------------------------------------


class Attention(nn.Module):
    """Multi-head attention that takes queries, keys and values from where it is told."""

    def __init__(self, config: MSHTConfig) -> None:
        super().__init__()
        self.heads = config.heads
        self.q = nn.Linear(config.width, config.width)
        self.k = nn.Linear(config.width, config.width)
        self.v = nn.Linear(config.width, config.width)
        self.proj = nn.Linear(config.width, config.width)

    def split(self, x: Tensor) -> Tensor:
        n, t, d = x.shape
        return x.reshape(n, t, self.heads, d // self.heads).transpose(1, 2)  # (N, T, D) -> (N, H, T, D/H)

    def values(self, x: Tensor) -> Tensor:
        return self.split(self.v(x))

    def forward(
        self, queries: Tensor, keys: Tensor, values: Tensor, bias: Tensor | None, need_weights: bool
    ) -> tuple[Tensor, Tensor | None]:
        q, k, v = self.split(self.q(queries)), self.split(self.k(keys)), self.values(values)  # each (N, H, T, D/H)
        if need_weights:
            weights = attention_weights(q, k, bias)
            mixed = weights @ v
        else:  # the same in one fused kernel that keeps its weights to itself
            weights = None
            mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
        return self.proj(mixed.transpose(1, 2).flatten(2)), weights  # (N, T, D), (N, H, T, T)


class Block(nn.Module):
    """One decoder block: the tokens among themselves, then as one stage of the convolutional side guides them."""

    def __init__(self, config: MSHTConfig, drop_path: float) -> None:
        super().__init__()
        self.norm1, self.norm2, self.norm3, self.norm4 = (nn.LayerNorm(config.width, eps=1e-6) for _ in range(4))
        self.attn = Attention(config)
        self.mlp1 = Mlp(config.width, config.mlp_ratio)
        self.guided = Attention(config)
        self.mlp2 = Mlp(config.width, config.mlp_ratio)
        self.drop_path = DropPath(drop_path)

    def forward(
        self, x: Tensor, gaze: Tensor, glance: Tensor, bias: Tensor | None, need_weights: bool
    ) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        y = self.norm1(x)
        mixed, own = self.attn(y, y, y, bias, need_weights)
        x = x + self.drop_path(mixed)
        x = x + self.drop_path(self.mlp1(self.norm2(x)))
        before = x
        mixed, guided = self.guided(gaze, glance, self.norm3(x), bias, need_weights)
        x = x + self.drop_path(mixed)
        x = x + self.drop_path(self.mlp2(self.norm4(x)))
        return x, before, own, guided


class MSHT(nn.Module):
    def __init__(self, config: MSHTConfig, classes: int) -> None:
        super().__init__()
        self.config = config
        self.scaling = Scaling(config.mean, config.std)
        self.encoder = Encoder(config)
        self.embed = nn.Conv2d(config.channels[-1], config.width, kernel_size=1)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, config.width))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + config.grid**2, config.width))
        self.focuses = nn.ModuleList(Focus(c, p, config.width) for c, p in zip(config.channels, POOLINGS, strict=True))
        rates = torch.linspace(0, config.drop_path, config.layers).tolist()
        self.blocks = nn.ModuleList([Block(config, rate) for rate in rates])
        self.norm = nn.LayerNorm(config.width, eps=1e-6)
        self.head = nn.Linear(config.feature_width, classes)
        initialise(self, [self.head])

    def forward(
        self,
        images: Tensor,  # (N, 3, S, S) in [0, 1]
        *,
        visible: Tensor | None = None,  # (N, M) indices of the patch tokens that take part
        keep: Tensor | None = None,  # (N, G*G) false removes a patch token; what the stages see is left to the caller
        need_weights: bool = False,
    ) -> Output:
        stages = self.encoder(self.scaling(images))
        x = self.place(to_tokens(self.embed(emphasise(stages[-1]))), visible)  # (N, T, D)
        bias = None if keep is None else removal_bias(keep).to(x.dtype)

        before, tokens, own_weights, guided_weights = x, [x], [], []
        for block, focus, stage in zip(self.blocks, self.focuses, stages, strict=True):
            gaze, glance = (self.place(look, visible) for look in focus(stage))
            x, before, own, guided = block(x, gaze, glance, bias, need_weights)
            tokens.append(x)
            if need_weights:
                own_weights.append(own)
                guided_weights.append(guided)

        features = pool(self.norm(x), keep, self.config.pool)  # (N, D) or (N, 2D)
        attentions = tuple(guided_weights), tuple(own_weights)
        return Output(self.head(features), features, tuple(tokens), *attentions, before)

    def place(self, patches: Tensor, visible: Tensor | None) -> Tensor:
        """Adds the class token and the positions, which are of one table for tokens, gaze and glance."""
        cls = self.cls_token.expand(patches.shape[0], -1, -1)  # (N, 1, D)
        x = torch.cat([cls, patches], dim=1) + self.pos_embed  # (N, T, D)
        if visible is None:
            return x
        return torch.cat([x[:, :1], select(x[:, 1:], visible)], dim=1)  # (N, 1 + M, D)
