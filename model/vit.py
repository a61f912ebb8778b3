"""The Vision Transformer of Dosovitskiy et al. (arXiv 2010.11929), in the order of the paper's figure 1.

RGB images in [0, 1] enter, an `Output` with every intermediate leaves. Parameter names are those of timm's ViT.
What is not particular to it, such as the MLP, is in `layers.py`.
Letters: N batch, S tile side, P patch side, G = S/P, T = 1 + G*G tokens, D width, H heads, L layers, K classes.
"""

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.colours import ColourHead, ColourVotes, weigh_votes
from model.efficientnet import EfficientStem
from model.layers import (
    DropPath,
    Mlp,
    Pooling,
    Scaling,
    attention_weights,
    initialise,
    mean_of_patches,
    pool,
    refuse_remainder,
    removal_bias,
    select,
)


@dataclass(frozen=True)
class ViTConfig:
    architecture: Literal["vit"] = "vit"
    tile_px: int = 150
    patch_px: int = 15  # 10 x 10 patches of 7.4 um, about a nucleus each; 10 px would cost 2.3 times as much
    width: int = 192
    layers: int = 6
    heads: int = 3  # 64 wide each, as in every ViT of the paper
    mlp_ratio: int = 4
    # One strided convolution, three small ones, or the first stages of an EfficientNet: the paper's hybrid.
    stem: Literal["patch", "conv", "efficientnet"] = "patch"
    pool: Pooling = "class"  # which tokens the head reads
    early_share: float = 0.0  # of a second head in the logits, which reads the patches as the stem gives them; 0: none
    colour_share: float = 0.0  # the most that a third head has, which reads colours alone; 0: none
    drop_path: float = 0.1
    mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    std: tuple[float, float, float] = (0.5, 0.5, 0.5)

    def __post_init__(self) -> None:
        refuse_remainder("tile_px", self.tile_px, "patch_px", self.patch_px)
        refuse_remainder("width", self.width, "heads", self.heads)
        for name in ("early_share", "colour_share"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} is {getattr(self, name)}, expected 0 to 1")
        if self.stem == "conv" and self.patch_px != 15:
            raise ValueError(f"the conv stem strides by 3 and 5, so patch_px must be 15, not {self.patch_px}")

    @property
    def grid(self) -> int:
        return self.tile_px // self.patch_px

    @property
    def feature_width(self) -> int:
        return self.head_width + (self.width if self.early_share else 0)

    @property
    def head_width(self) -> int:
        return 2 * self.width if self.pool == "both" else self.width


class Output(NamedTuple):
    logits: Tensor  # (N, K)
    features: Tensor  # (N, D) each of what the heads read: the class token, the mean of the patches, the early mean
    tokens: tuple[Tensor, ...]  # L + 1 of (N, T, D): as embedded, then after each block
    attentions: tuple[Tensor, ...]  # L of (N, H, T, T), empty unless asked for
    opinions: tuple[Tensor, ...]  # logits (N, K) of each head that is trained; `logits` is the weighted mean of all
    colours: ColourVotes | None  # of the head that is taught instead


class PatchEmbed(nn.Module):
    """Cuts the image into P x P patches and projects each: one convolution with kernel = stride = P (section 3.1)."""

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, config.width, kernel_size=config.patch_px, stride=config.patch_px)

    def forward(self, images: Tensor) -> Tensor:
        patches: Tensor = self.proj(images)  # (N, D, G, G)
        return patches.flatten(2).transpose(1, 2)  # (N, G*G, D)


class ConvStem(nn.Module):
    """Early convolutions help transformers see better (Xiao et al., arXiv 2106.14881): same grid, softer borders.

    Strides 3 and 5 with these paddings keep every kernel centred on its cell, so that token i still is patch i.
    """

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        channels = config.width // 4
        self.conv1 = nn.Conv2d(3, channels, kernel_size=7, stride=3, padding=2)
        self.norm1 = nn.BatchNorm2d(channels)  # not per image: how dark and how red a tile is tells tissues apart
        self.conv2 = nn.Conv2d(channels, channels, kernel_size=3, padding=1)
        self.norm2 = nn.BatchNorm2d(channels)
        self.proj = nn.Conv2d(channels, config.width, kernel_size=7, stride=5, padding=1)

    def forward(self, images: Tensor) -> Tensor:
        x = F.gelu(self.norm1(self.conv1(images)))  # (N, D/4, S/3, S/3)
        x = F.gelu(self.norm2(self.conv2(x)))
        patches: Tensor = self.proj(x)  # (N, D, G, G)
        return patches.flatten(2).transpose(1, 2)  # (N, G*G, D)


def build_stem(config: ViTConfig) -> nn.Module:
    match config.stem:
        case "patch":
            return PatchEmbed(config)
        case "conv":
            return ConvStem(config)
        case "efficientnet":
            return EfficientStem(config.tile_px, config.grid, config.width)


class Attention(nn.Module):
    """Multi-head self-attention: H scaled dot-product attentions side by side, then one output projection."""

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        self.heads = config.heads
        self.qkv = nn.Linear(config.width, 3 * config.width)
        self.proj = nn.Linear(config.width, config.width)

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        n, t, d = x.shape
        qkv = self.qkv(x).reshape(n, t, 3, self.heads, d // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # each (N, H, T, D/H)
        return q, k, v

    def forward(self, x: Tensor, bias: Tensor | None, need_weights: bool) -> tuple[Tensor, Tensor | None]:
        q, k, v = self.project(x)

        if need_weights:
            weights = attention_weights(q, k, bias)
            mixed = weights @ v  # (N, H, T, D/H)
        else:  # the same mathematics in one fused kernel that keeps its weights to itself
            weights = None
            mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)

        return self.proj(mixed.transpose(1, 2).reshape(x.shape)), weights  # (N, T, D), (N, H, T, T)


class Block(nn.Module):
    """One encoder block: norm, attention, add; norm, MLP, add (equations 2 and 3)."""

    def __init__(self, config: ViTConfig, drop_path: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(config.width, eps=1e-6)
        self.attn = Attention(config)
        self.norm2 = nn.LayerNorm(config.width, eps=1e-6)
        self.mlp = Mlp(config.width, config.mlp_ratio)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor, bias: Tensor | None, need_weights: bool) -> tuple[Tensor, Tensor | None]:
        mixed, weights = self.attn(self.norm1(x), bias, need_weights)
        x = x + self.drop_path(mixed)
        x = x + self.drop_path(self.mlp(self.norm2(x)))
        return x, weights


class ViT(nn.Module):
    def __init__(self, config: ViTConfig, classes: int) -> None:
        super().__init__()
        self.config = config
        self.scaling = Scaling(config.mean, config.std)
        self.patch_embed = build_stem(config)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, config.width))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + config.grid**2, config.width))
        rates = torch.linspace(0, config.drop_path, config.layers).tolist()  # deeper blocks are skipped more often
        self.blocks = nn.ModuleList([Block(config, rate) for rate in rates])
        self.norm = nn.LayerNorm(config.width, eps=1e-6)
        self.head = nn.Linear(config.head_width, classes)
        heads = [self.head]
        if config.early_share:
            self.early_norm = nn.BatchNorm1d(config.width, affine=False)
            self.early_head = nn.Linear(config.width, classes)
            heads.append(self.early_head)
        if config.colour_share:
            self.colour_head = ColourHead(config.patch_px, classes)
        initialise(self, heads)

    def embed(self, images: Tensor) -> tuple[Tensor, Tensor]:
        patches = self.patch_embed(self.scaling(images))  # (N, G*G, D)
        cls = self.cls_token.expand(patches.shape[0], -1, -1)  # (N, 1, D)
        return patches, torch.cat([cls, patches], dim=1) + self.pos_embed  # (N, T, D)

    def forward(
        self,
        images: Tensor,  # (N, 3, S, S) in [0, 1]
        *,
        visible: Tensor | None = None,  # (N, M) indices of the patches to look at: fewer tokens, faster training
        keep: Tensor | None = None,  # (N, G*G) false removes a patch: also in a graph, whose sizes are fixed
        need_weights: bool = False,
    ) -> Output:
        patches, x = self.embed(images)  # (N, G*G, D), (N, T, D)
        if visible is not None:
            patches = select(patches, visible)  # (N, M, D)
            x = torch.cat([x[:, :1], select(x[:, 1:], visible)], dim=1)  # (N, 1 + M, D)
        bias = None if keep is None else removal_bias(keep).to(x.dtype)

        tokens, attentions = [x], []
        for block in self.blocks:
            x, weights = block(x, bias, need_weights)
            tokens.append(x)
            if weights is not None:
                attentions.append(weights)

        features = pool(self.norm(x), keep, self.config.pool)  # (N, D) or (N, 2D)
        logits: Tensor = self.head(features)
        opinions: tuple[Tensor, ...] = (logits,)
        if self.config.early_share:
            early = self.early_norm(mean_of_patches(patches, keep))  # (N, D)
            opinions = (logits, self.early_head(early))
            logits = mix(logits, opinions[1], self.config.early_share)
            features = torch.cat([features, early], dim=1)
        colours = None
        if self.config.colour_share:
            said = self.colour_head(images)  # (N, G*G, K + 1)
            said = said if visible is None else select(said, visible)
            mean = mean_of_patches(said, keep)  # (N, K + 1)
            colours = ColourVotes(said[..., :-1], weigh_votes(self.config.colour_share, known=mean[:, -1:]))
            logits = mix(logits, mean[:, :-1] + self.colour_head.bias, colours.share)
        return Output(logits, features, tuple(tokens), tuple(attentions), opinions, colours)


def mix(some: Tensor, others: Tensor, share: float | Tensor) -> Tensor:
    return (1 - share) * some + share * others  # torch.lerp would leave branches in the graph
