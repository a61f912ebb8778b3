"""The network as it is shipped: uint8 tiles in, calibrated probabilities and maps out, nothing left to the caller.

`PredictGraph` and `ExplainGraph` wrap one trained ViT; `training.export` turns each into an ONNX file.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.vit import Block, Output, ViT, patch_shares


def to_images(tiles: Tensor) -> Tensor:
    return tiles.permute(0, 3, 1, 2).float() / 255  # (N, S, S, 3) uint8 -> (N, 3, S, S) in [0, 1]


def to_grid(maps: Tensor) -> Tensor:
    side = math.isqrt(maps.shape[-1])
    return maps.reshape(*maps.shape[:-1], side, side)  # (..., G*G) -> (..., G, G)


class Prediction(NamedTuple):
    logits: Tensor  # (N, K)
    probabilities: Tensor  # (N, K), calibrated
    features: Tensor  # (N, D) or (N, 2D)


class Explanation(NamedTuple):
    logits: Tensor
    probabilities: Tensor
    features: Tensor
    attention: Tensor  # (N, L, H, G, G)
    rollout: Tensor  # (N, G, G)
    evidence: Tensor  # (N, K, G, G)


class PredictGraph(nn.Module):
    def __init__(self, vit: ViT, temperature: float) -> None:
        super().__init__()
        self.vit = vit
        self.temperature = temperature

    def forward(self, tiles: Tensor) -> Prediction:
        out = self.vit(to_images(tiles))
        return Prediction(out.logits, (out.logits / self.temperature).softmax(dim=1), out.features)


class ExplainGraph(nn.Module):
    def __init__(self, vit: ViT, temperature: float) -> None:
        super().__init__()
        self.vit = vit
        self.temperature = temperature

    def forward(self, tiles: Tensor, keep: Tensor) -> Explanation:
        out = self.vit(to_images(tiles), keep=keep, need_weights=True)
        return Explanation(
            out.logits,
            (out.logits / self.temperature).softmax(dim=1),
            out.features,
            to_grid(readout_attention(self.vit, out)),
            to_grid(rollout(self.vit, out, keep)),
            to_grid(evidence(self.vit, out, keep)),
        )


def readout_attention(vit: ViT, out: Output) -> Tensor:
    """How the token that the head reads spreads its attention over the patches, in every layer and head.

    The class token's row; where the head reads only the mean of the patches, the mean of their rows.
    """
    attention = torch.stack(out.attentions, dim=1)  # (N, L, H, T, T)
    if vit.config.pool == "mean":
        return attention[..., 1:, 1:].mean(dim=-2)  # (N, L, H, G*G)
    return attention[..., 0, 1:]


def rollout(vit: ViT, out: Output, keep: Tensor) -> Tensor:
    """Attention rollout (Abnar & Zuidema, arXiv 2005.00928): half attention, half residual, layer upon layer.

    Only the row that is read is carried from the last layer to the first, so it costs a vector per layer.
    """
    shares = patch_shares(keep).to(out.logits.dtype)  # (N, G*G)
    reads_class = torch.zeros_like(shares[:, :1]) if vit.config.pool == "mean" else torch.ones_like(shares[:, :1])
    reads_patches = shares if vit.config.pool == "mean" else torch.zeros_like(shares)
    row = torch.cat([reads_class, reads_patches], dim=1).unsqueeze(1)  # (N, 1, T)
    for weights in reversed(out.attentions):
        row = 0.5 * (row @ weights.mean(dim=1)) + 0.5 * row
    return row[:, 0, 1:]  # (N, G*G)


def evidence(vit: ViT, out: Output, keep: Tensor) -> Tensor:
    """What each patch adds to each class's logit, signed, in logit units.

    Where the head reads the mean of the patches this is exact: the patches' shares and the bias add up to the logit
    (class activation mapping, arXiv 1512.04150). Where it reads the class token it is of first order: how the logit
    changes with what the patch told the class token in the last block. A head that reads both gets the sum.
    """
    width = vit.config.width
    weight = vit.head.weight  # (K, D) or (K, 2D)
    x = out.tokens[-1]  # (N, T, D)
    shares = patch_shares(keep)  # (N, G*G)
    total = torch.zeros(x.shape[0], weight.shape[0], x.shape[1] - 1, device=x.device, dtype=x.dtype)  # (N, K, G*G)

    if vit.config.pool != "class":
        patches = vit.norm(x)[:, 1:] * shares.unsqueeze(-1).to(x.dtype)  # (N, G*G, D)
        total = total + weight[:, -width:] @ patches.transpose(1, 2)
    if vit.config.pool != "mean":
        total = total + class_token_evidence(vit, out, weight[:, :width])
    return total


def class_token_evidence(vit: ViT, out: Output, weight: Tensor) -> Tensor:
    """First order in the last block: gradient at the class token, times the message it got from each patch."""
    block = vit.blocks[-1]
    assert isinstance(block, Block)
    before = out.tokens[-2]  # (N, T, D)
    messages = patch_messages(block, before, out.attentions[-1])  # (N, G*G, D)

    cls = out.tokens[-1][:, 0]  # (N, D), after the block
    cls_mid = before[:, 0] + class_update(block, before, out.attentions[-1])  # (N, D), before its MLP

    gradient = weight.expand(cls.shape[0], -1, -1)  # (N, K, D): logit by normed class token
    gradient = layer_norm_backward(gradient, cls, vit.norm)
    gradient = gradient + mlp_backward(gradient, cls_mid, block)  # along the residual, and through the MLP
    return gradient @ messages.transpose(1, 2)  # (N, K, G*G)


def patch_messages(block: Block, before: Tensor, weights: Tensor) -> Tensor:
    _, _, v = block.attn.project(block.norm1(before))  # (N, H, T, D/H)
    weighted = weights[:, :, 0, 1:, None] * v[:, :, 1:]  # (N, H, G*G, D/H)
    return F.linear(weighted.transpose(1, 2).flatten(2), block.attn.proj.weight)  # (N, G*G, D)


def class_update(block: Block, before: Tensor, weights: Tensor) -> Tensor:
    _, _, v = block.attn.project(block.norm1(before))
    mixed = weights[:, :, :1] @ v  # (N, H, 1, D/H)
    update: Tensor = block.attn.proj(mixed.transpose(1, 2).flatten(2))  # (N, 1, D)
    return update[:, 0]


def mlp_backward(gradient: Tensor, x: Tensor, block: Block) -> Tensor:
    hidden = block.mlp.fc1(block.norm2(x))  # (N, 4D)
    gradient = gradient @ block.mlp.fc2.weight  # (N, K, 4D)
    gradient = gradient * gelu_slope(hidden).unsqueeze(1)
    return layer_norm_backward(gradient @ block.mlp.fc1.weight, x, block.norm2)  # (N, K, D)


def gelu_slope(x: Tensor) -> Tensor:
    return 0.5 * (1 + torch.erf(x / math.sqrt(2))) + x * torch.exp(-0.5 * x * x) / math.sqrt(2 * math.pi)


def layer_norm_backward(gradient: Tensor, x: Tensor, norm: nn.LayerNorm) -> Tensor:
    """From the gradient at LayerNorm's output (N, K, D) to that at its input x (N, D)."""
    centred = x - x.mean(dim=-1, keepdim=True)
    scale = (centred.square().mean(dim=-1, keepdim=True) + norm.eps).rsqrt()
    normed = (centred * scale).unsqueeze(1)  # (N, 1, D)
    g = gradient * norm.weight
    g = g - g.mean(dim=-1, keepdim=True) - normed * (g * normed).mean(dim=-1, keepdim=True)
    return g * scale.unsqueeze(1)
