"""The Vision Transformer of Dosovitskiy et al. (arXiv 2010.11929), whole, in the order of the paper's figure 1.

RGB images in [0, 1] enter, an `Output` with every intermediate leaves. Parameter names are those of timm's ViT.
Letters: N batch, S tile side, P patch side, G = S/P, T = 1 + G*G tokens, D width, H heads, L layers, K classes.
"""

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.efficientnet import EfficientStem


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
    pool: Literal["class", "mean", "both"] = "class"  # which tokens the head reads
    early_share: float = 0.0  # in the logits, of a second head: it reads the patches as the stem gives them; 0: none
    drop_path: float = 0.1
    mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    std: tuple[float, float, float] = (0.5, 0.5, 0.5)

    def __post_init__(self) -> None:
        refuse_remainder("tile_px", self.tile_px, "patch_px", self.patch_px)
        refuse_remainder("width", self.width, "heads", self.heads)
        if not 0 <= self.early_share <= 1:
            raise ValueError(f"early_share is {self.early_share}, expected 0 to 1")
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


def refuse_remainder(whole: str, size: int, part: str, divisor: int) -> None:
    if size % divisor:
        fitting = [n for n in range(1, size + 1) if size % n == 0]
        raise ValueError(f"{whole} {size} is not a multiple of {part} {divisor}; {part} may be one of {fitting}")


class Output(NamedTuple):
    logits: Tensor  # (N, K)
    features: Tensor  # (N, D) for each that the heads read: the class token, the mean of the patches, the early mean
    tokens: tuple[Tensor, ...]  # L + 1 of (N, T, D): as embedded, then after each block
    attentions: tuple[Tensor, ...]  # L of (N, H, T, T), empty unless asked for
    opinions: tuple[Tensor, ...]  # logits (N, K) of each head; `logits` is their weighted mean


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


def attention_weights(q: Tensor, k: Tensor, bias: Tensor | None) -> Tensor:
    """softmax(Q K^T / sqrt(d_k)), equation 1 of Vaswani et al. (arXiv 1706.03762)."""
    scores = q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])  # (N, H, T, T)
    if bias is not None:
        scores = scores + bias
    return scores.softmax(dim=-1)


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


class Mlp(nn.Module):
    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        self.fc1 = nn.Linear(config.width, config.mlp_ratio * config.width)
        self.fc2 = nn.Linear(config.mlp_ratio * config.width, config.width)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.fc2(F.gelu(self.fc1(x)))
        return out


class DropPath(nn.Module):
    """Skips a residual branch for some images of the batch (stochastic depth, arXiv 1603.09382)."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, branch: Tensor) -> Tensor:
        if not self.training or self.rate == 0:
            return branch
        kept = torch.rand(branch.shape[0], 1, 1, device=branch.device) >= self.rate  # (N, 1, 1)
        return branch * kept / (1 - self.rate)


class Block(nn.Module):
    """One encoder block: norm, attention, add; norm, MLP, add (equations 2 and 3)."""

    def __init__(self, config: ViTConfig, drop_path: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(config.width, eps=1e-6)
        self.attn = Attention(config)
        self.norm2 = nn.LayerNorm(config.width, eps=1e-6)
        self.mlp = Mlp(config)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor, bias: Tensor | None, need_weights: bool) -> tuple[Tensor, Tensor | None]:
        mixed, weights = self.attn(self.norm1(x), bias, need_weights)
        x = x + self.drop_path(mixed)
        x = x + self.drop_path(self.mlp(self.norm2(x)))
        return x, weights


def by_channel(values: tuple[float, float, float]) -> Tensor:
    """(3, 1, 1); or (1,) where all are alike, with which the graph is 4 % faster."""
    return torch.tensor(values).view(3, 1, 1) if len(set(values)) > 1 else torch.tensor(values[:1])


class ViT(nn.Module):
    mean: Tensor
    std: Tensor

    def __init__(self, config: ViTConfig, classes: int) -> None:
        super().__init__()
        self.config = config
        self.register_buffer("mean", by_channel(config.mean), persistent=False)
        self.register_buffer("std", by_channel(config.std), persistent=False)

        self.patch_embed = build_stem(config)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, config.width))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + config.grid**2, config.width))
        rates = torch.linspace(0, config.drop_path, config.layers).tolist()  # deeper blocks are skipped more often
        self.blocks = nn.ModuleList([Block(config, rate) for rate in rates])
        self.norm = nn.LayerNorm(config.width, eps=1e-6)
        self.head = nn.Linear(config.head_width, classes)
        if config.early_share:
            self.early_norm = nn.BatchNorm1d(config.width, affine=False)
            self.early_head = nn.Linear(config.width, classes)
        self.initialise()

    def initialise(self) -> None:
        nn.init.trunc_normal_(self.cls_token, std=0.02)
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)
        nn.init.zeros_(self.head.weight)  # every class equally likely before the first step
        if self.config.early_share:
            nn.init.zeros_(self.early_head.weight)

    def embed(self, images: Tensor) -> tuple[Tensor, Tensor]:
        patches = self.patch_embed((images - self.mean) / self.std)  # (N, G*G, D)
        cls = self.cls_token.expand(patches.shape[0], -1, -1)  # (N, 1, D)
        return patches, torch.cat([cls, patches], dim=1) + self.pos_embed  # (N, T, D)

    def forward(
        self,
        images: Tensor,  # (N, 3, S, S) in [0, 1]
        *,
        kept: Tensor | None = None,  # (N, M) indices of the patches to look at: fewer tokens, faster training
        keep: Tensor | None = None,  # (N, G*G) false removes a patch: the same, in a graph whose sizes are fixed
        need_weights: bool = False,
    ) -> Output:
        patches, x = self.embed(images)  # (N, G*G, D), (N, T, D)
        if kept is not None:
            patches, x = select(patches, kept), torch.cat([x[:, :1], select(x[:, 1:], kept)], dim=1)  # (N, 1 + M, D)
        bias = None if keep is None else removal_bias(keep).to(x.dtype)

        tokens, attentions = [x], []
        for block in self.blocks:
            x, weights = block(x, bias, need_weights)
            tokens.append(x)
            if weights is not None:
                attentions.append(weights)

        features = self.pool(self.norm(x), keep)  # (N, D) or (N, 2D)
        logits: Tensor = self.head(features)
        if not self.config.early_share:
            return Output(logits, features, tuple(tokens), tuple(attentions), (logits,))
        early = self.early_norm(mean_of_patches(patches, keep))  # (N, D)
        share, early_logits = self.config.early_share, self.early_head(early)
        weighed = (1 - share) * logits + share * early_logits  # torch.lerp would leave branches in the graph
        features = torch.cat([features, early], dim=1)
        return Output(weighed, features, tuple(tokens), tuple(attentions), (logits, early_logits))

    def pool(self, x: Tensor, keep: Tensor | None) -> Tensor:
        if self.config.pool == "class":
            return x[:, 0]
        if self.config.pool == "mean":
            return mean_of_patches(x[:, 1:], keep)
        return torch.cat([x[:, 0], mean_of_patches(x[:, 1:], keep)], dim=1)  # (N, 2D)


def select(patches: Tensor, kept: Tensor) -> Tensor:
    return patches.gather(1, kept.unsqueeze(-1).expand(-1, -1, patches.shape[-1]))  # (N, M, D)


def removal_bias(keep: Tensor) -> Tensor:
    """Added to the scores before the softmax, so that nobody attends to a removed patch: the class token never is."""
    keep_all = torch.cat([torch.ones_like(keep[:, :1]), keep], dim=1)  # (N, T)
    return torch.where(keep_all, 0.0, -1e4)[:, None, None, :]  # (N, 1, 1, T); -1e4 is fp16's idea of never


def mean_of_patches(patches: Tensor, keep: Tensor | None) -> Tensor:
    if keep is None:
        return patches.mean(dim=1)
    share = patch_shares(keep).to(patches.dtype)
    return (patches * share.unsqueeze(-1)).sum(dim=1)


def patch_shares(keep: Tensor) -> Tensor:
    """What each patch counts in the mean: 1/kept, and nothing where it was removed."""
    kept = keep.float()
    return kept / kept.sum(dim=1, keepdim=True).clamp(min=1)  # (N, G*G)
