"""What several networks are made of, so that they differ only where they mean to.

Letters: N batch, S tile side, G patches along a side, T = 1 + G*G tokens, M patches looked at, D width.
"""

import math
from collections.abc import Iterable
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

PATCH_PX = 15  # of the networks whose grid follows from fixed strides, of 3 and then 5
Pooling = Literal["class", "mean", "both"]  # which tokens the head reads


class Scaling(nn.Module):
    """From [0, 1] to what the weights were trained on."""

    mean: Tensor
    std: Tensor

    def __init__(self, mean: tuple[float, float, float], std: tuple[float, float, float]) -> None:
        super().__init__()
        self.register_buffer("mean", by_channel(mean), persistent=False)
        self.register_buffer("std", by_channel(std), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        return (images - self.mean) / self.std  # (N, 3, S, S)


def by_channel(values: tuple[float, float, float]) -> Tensor:
    """(3, 1, 1); or (1,) where all are alike, with which the graph is 4 % faster."""
    return torch.tensor(values).view(3, 1, 1) if len(set(values)) > 1 else torch.tensor(values[:1])


def refuse_remainder(whole: str, size: int, part: str, divisor: int) -> None:
    if size % divisor:
        fitting = [n for n in range(1, size + 1) if size % n == 0]
        raise ValueError(f"{whole} {size} is not a multiple of {part} {divisor}; {part} may be one of {fitting}")


def attention_weights(q: Tensor, k: Tensor, bias: Tensor | None) -> Tensor:
    """softmax(Q K^T / sqrt(d_k)), equation 1 of Vaswani et al. (arXiv 1706.03762)."""
    scores = q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])  # (N, H, T, T)
    if bias is not None:
        scores = scores + bias
    return scores.softmax(dim=-1)


class Mlp(nn.Module):
    def __init__(self, width: int, ratio: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, ratio * width)
        self.fc2 = nn.Linear(ratio * width, width)

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
        stays = torch.rand(branch.shape[0], 1, 1, device=branch.device) >= self.rate  # (N, 1, 1)
        return branch * stays / (1 - self.rate)


class Residual(nn.Module):
    """Two convolutions and a way around them (He et al., arXiv 1512.03385). A stride of 5 keeps kernels centred.

    The way around is `bare` where it hands on its input as it is.
    """

    def __init__(self, inside: int, outside: int, stride: int, bare: bool = False) -> None:
        super().__init__()
        kernel = 3 if stride == 1 else stride + 2
        self.conv1 = nn.Conv2d(inside, outside, kernel, stride, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(outside)
        self.conv2 = nn.Conv2d(outside, outside, kernel_size=3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(outside)
        # Made even where it isn't used: it draws random numbers, and a seed must go on giving the weights that it gave.
        around = nn.Sequential(nn.AvgPool2d(stride), nn.Conv2d(inside, outside, kernel_size=1))
        self.shortcut = nn.Identity() if bare else around

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.norm1(self.conv1(x)))
        return F.relu(self.norm2(self.conv2(y)) + self.shortcut(x))


def initialise(net: nn.Module, heads: Iterable[nn.Linear]) -> None:
    """The parameters of a network itself, not of its layers, are tables: its class token and its positions."""
    for table in net.parameters(recurse=False):
        nn.init.trunc_normal_(table, std=0.02)
    for module in net.modules():
        if isinstance(module, nn.Linear):
            nn.init.trunc_normal_(module.weight, std=0.02)
            nn.init.zeros_(module.bias)
    for head in heads:
        nn.init.zeros_(head.weight)  # every class equally likely before the first step


def select(patches: Tensor, visible: Tensor) -> Tensor:
    return patches.gather(1, visible.unsqueeze(-1).expand(-1, -1, patches.shape[-1]))  # (N, M, D)


def removal_bias(keep: Tensor) -> Tensor:
    """Is added to the scores before the softmax, so that no token attends to a removed patch.

    The class token is never removed.
    """
    keep_all = torch.cat([torch.ones_like(keep[:, :1]), keep], dim=1)  # (N, T)
    return torch.where(keep_all, 0.0, -1e4)[:, None, None, :]  # (N, 1, 1, T); fp16 holds -1e4, and its exponential is 0


def pool(tokens: Tensor, keep: Tensor | None, pooling: Pooling) -> Tensor:
    if pooling == "class":
        return tokens[:, 0]  # (N, D)
    mean = mean_of_patches(tokens[:, 1:], keep)  # (N, D)
    return mean if pooling == "mean" else torch.cat([tokens[:, 0], mean], dim=1)  # (N, 2D)


def mean_of_patches(patches: Tensor, keep: Tensor | None) -> Tensor:
    if keep is None:
        return patches.mean(dim=1)
    share = patch_shares(keep).to(patches.dtype)
    return (patches * share.unsqueeze(-1)).sum(dim=1)


def patch_shares(keep: Tensor) -> Tensor:
    """The weight of each patch in the mean: 1/kept, or 0 where the patch was removed."""
    kept = keep.float()
    return kept / kept.sum(dim=1, keepdim=True).clamp(min=1)  # (N, G*G)
