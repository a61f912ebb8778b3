"""The network as it is shipped: uint8 tiles in, calibrated probabilities and maps out, nothing left to the caller.

`PredictGraph` and `ExplainGraph` wrap one trained network; `training.export` turns each into an ONNX file. Which maps
there are depends on the network: one without tokens has no attention, and its evidence is exact.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model import convnets, msht, vit
from model.artifact import MAP_METHODS, MapMethod, Removal
from model.layers import Mlp, patch_shares
from model.msht import MSHT, MSHTConfig
from model.network import Network, NetworkConfig, TokenNetwork
from model.vit import ViT, ViTConfig


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
    evidence: Tensor  # (N, K, G, G)


class TokenExplanation(NamedTuple):
    logits: Tensor
    probabilities: Tensor
    features: Tensor
    attention: Tensor  # (N, L, H, G, G)
    rollout: Tensor  # (N, G, G)
    evidence: Tensor  # (N, K, G, G)


def find_methods(config: NetworkConfig) -> list[MapMethod]:
    has_tokens = isinstance(config, ViTConfig | MSHTConfig)
    return list(MAP_METHODS) if has_tokens else ["evidence", "occlusion"]


def find_removal(config: NetworkConfig) -> Removal:
    """What of a patch `keep` takes away.

    A plain ViT sees a patch through its token alone. Where convolutions go deeper its neighbours see it too, so there
    its pixels must go.
    """
    if isinstance(config, ViTConfig) and config.stem != "efficientnet":
        return "token"
    return "pixels and token" if isinstance(config, ViTConfig | MSHTConfig) else "pixels"


def name_outputs(config: NetworkConfig) -> tuple[str, ...]:
    return TokenExplanation._fields if "attention" in find_methods(config) else Explanation._fields


class PredictGraph(nn.Module):
    def __init__(self, net: Network, temperature: float) -> None:
        super().__init__()
        self.net = net
        self.temperature = temperature

    def forward(self, tiles: Tensor) -> Prediction:
        return calibrate(self.net(to_images(tiles)), self.temperature)


class ExplainGraph(nn.Module):
    def __init__(self, net: Network, temperature: float) -> None:
        super().__init__()
        self.net = net
        self.temperature = temperature

    def forward(self, tiles: Tensor, keep: Tensor) -> Explanation | TokenExplanation:
        net, images = self.net, to_images(tiles)
        if find_removal(net.config) != "token":
            images = fill_removed(images, keep)
        if not isinstance(net, ViT | MSHT):
            out = net(images)
            return Explanation(*calibrate(out, self.temperature), to_grid(cell_evidence(net, out)))
        out = net(images, keep=keep, need_weights=True)
        return TokenExplanation(
            *calibrate(out, self.temperature),
            to_grid(readout_attention(net, out)),
            to_grid(rollout(net, out, keep)),
            to_grid(evidence(net, out, keep)),
        )


def calibrate(out: vit.Output | msht.Output | convnets.Output, temperature: float) -> Prediction:
    return Prediction(out.logits, (out.logits / temperature).softmax(dim=1), out.features)


def fill_removed(images: Tensor, keep: Tensor) -> Tensor:
    """Removed patches in the mean colour of those that stay; grey where none does."""
    n, _, s, _ = images.shape
    grid = math.isqrt(keep.shape[1])
    patch = s // grid
    stays = keep.to(images.dtype).view(n, 1, grid, 1, grid, 1).expand(n, 1, grid, patch, grid, patch)
    stays = stays.reshape(n, 1, s, s)
    pixels = stays.sum(dim=(2, 3), keepdim=True)  # (N, 1, 1, 1)
    colour = (images * stays).sum(dim=(2, 3), keepdim=True) / pixels.clamp(min=1)  # (N, 3, 1, 1)
    colour = torch.where(pixels > 0, colour, 0.5)
    return images * stays + colour * (1 - stays)


def cell_evidence(net: nn.Module, out: convnets.Output) -> Tensor:
    """Class activation mapping (arXiv 1512.04150), exact: the cells' parts and the bias add up to the logit."""
    weight = net.get_parameter("ending.head.weight")  # (K, D)
    cells = out.cells.flatten(2)  # (N, D, G*G)
    return weight @ cells / cells.shape[-1]  # (N, K, G*G)


def readout_attention(net: TokenNetwork, out: vit.Output | msht.Output) -> Tensor:
    """How the token that the head reads spreads its attention over the patches, in every layer and head.

    That is the class token's row or, where the head reads only the mean of the patches, the mean of their rows. MSHT's
    layers are its four guided attentions, one for each convolutional stage.
    """
    attention = torch.stack(out.attentions, dim=1)  # (N, L, H, T, T)
    if net.config.pool == "mean":
        return attention[..., 1:, 1:].mean(dim=-2)  # (N, L, H, G*G)
    return attention[..., 0, 1:]


def rollout(net: TokenNetwork, out: vit.Output | msht.Output, keep: Tensor) -> Tensor:
    """Attention rollout (Abnar & Zuidema, arXiv 2005.00928): half attention, half residual, layer upon layer.

    Only the row that is read is carried from the last layer to the first, so it costs a vector per layer. Each block of
    MSHT mixes twice, by its own attention and then by the guided one.
    """
    mixings = list(out.attentions)
    if isinstance(out, msht.Output):
        pairs = zip(out.self_attentions, out.attentions, strict=True)
        mixings = [weights for pair in pairs for weights in pair]
    shares = patch_shares(keep).to(out.logits.dtype)  # (N, G*G)
    reads_class = torch.zeros_like(shares[:, :1]) if net.config.pool == "mean" else torch.ones_like(shares[:, :1])
    reads_patches = shares if net.config.pool == "mean" else torch.zeros_like(shares)
    row = torch.cat([reads_class, reads_patches], dim=1).unsqueeze(1)  # (N, 1, T)
    for weights in reversed(mixings):
        row = 0.5 * (row @ weights.mean(dim=1)) + 0.5 * row
    return row[:, 0, 1:]  # (N, G*G)


class LastMixing(NamedTuple):
    """The last attention through which patches tell the class token something, and what follows it."""

    before: Tensor  # (N, T, D) the tokens that it mixes
    weights: Tensor  # (N, H, T, T)
    values: Tensor  # (N, H, T, D/H)
    proj: nn.Linear
    norm: nn.LayerNorm  # of the MLP that follows
    mlp: Mlp


def find_last_mixing(net: TokenNetwork, out: vit.Output | msht.Output) -> LastMixing:
    block, weights = net.blocks[-1], out.attentions[-1]
    if isinstance(block, msht.Block) and isinstance(out, msht.Output):
        values = block.guided.values(block.norm3(out.before_guidance))
        return LastMixing(out.before_guidance, weights, values, block.guided.proj, block.norm4, block.mlp2)
    assert isinstance(block, vit.Block)
    before = out.tokens[-2]
    _, _, values = block.attn.project(block.norm1(before))
    return LastMixing(before, weights, values, block.attn.proj, block.norm2, block.mlp)


def evidence(net: TokenNetwork, out: vit.Output | msht.Output, keep: Tensor) -> Tensor:
    """What each patch adds to each class's logit, signed, in logit units.

    Where the head reads the mean of the patches this is exact: the patches' shares and the bias add up to the logit
    (class activation mapping, arXiv 1512.04150). Where it reads the class token it is of first order: how the logit
    changes with what the patch told the class token in the last block. A head that reads both gets the sum. Of several
    heads each counts by its share in the logit.
    """
    total = head_evidence(net, out, keep)
    if isinstance(net, ViT) and net.config.early_share:
        early = early_evidence(net, out.tokens[0][:, 1:] - net.pos_embed[:, 1:], keep)
        total = vit.mix(total, early, net.config.early_share)
    if isinstance(out, vit.Output) and out.colours is not None:
        votes = out.colours.patches * patch_shares(keep).unsqueeze(-1).to(total.dtype)  # (N, G*G, K)
        total = vit.mix(total, votes.transpose(1, 2), out.colours.share.unsqueeze(-1))
    return total


def early_evidence(net: ViT, patches: Tensor, keep: Tensor) -> Tensor:
    """Exact, as of any mean: each patch counts by how far it is from the mean patch of the training."""
    norm, shares = net.early_norm, patch_shares(keep)
    assert norm.running_mean is not None and norm.running_var is not None
    normed = (patches - norm.running_mean) / (norm.running_var + norm.eps).sqrt()  # (N, G*G, D)
    return net.early_head.weight @ (normed * shares.unsqueeze(-1).to(patches.dtype)).transpose(1, 2)  # (N, K, G*G)


def head_evidence(net: TokenNetwork, out: vit.Output | msht.Output, keep: Tensor) -> Tensor:
    width = net.config.width
    weight = net.head.weight  # (K, D) or (K, 2D)
    x = out.tokens[-1]  # (N, T, D)
    shares = patch_shares(keep)  # (N, G*G)
    total = torch.zeros(x.shape[0], weight.shape[0], x.shape[1] - 1, device=x.device, dtype=x.dtype)  # (N, K, G*G)

    if net.config.pool != "class":
        patches = net.norm(x)[:, 1:] * shares.unsqueeze(-1).to(x.dtype)  # (N, G*G, D)
        total = total + weight[:, -width:] @ patches.transpose(1, 2)
    if net.config.pool != "mean":
        total = total + class_token_evidence(net.norm, x, find_last_mixing(net, out), weight[:, :width])
    return total


def class_token_evidence(norm: nn.LayerNorm, after: Tensor, last: LastMixing, weight: Tensor) -> Tensor:
    """First order in the last block: gradient at the class token, times the message it got from each patch."""
    messages = patch_messages(last)  # (N, G*G, D)
    cls = after[:, 0]  # (N, D), after the block
    cls_mid = last.before[:, 0] + class_update(last)  # (N, D), before its MLP

    gradient = weight.expand(cls.shape[0], -1, -1)  # (N, K, D): logit by normed class token
    gradient = layer_norm_backward(gradient, cls, norm)
    gradient = gradient + mlp_backward(gradient, cls_mid, last)  # along the residual, and through the MLP
    return gradient @ messages.transpose(1, 2)  # (N, K, G*G)


def patch_messages(last: LastMixing) -> Tensor:
    weighted = last.weights[:, :, 0, 1:, None] * last.values[:, :, 1:]  # (N, H, G*G, D/H)
    return F.linear(weighted.transpose(1, 2).flatten(2), last.proj.weight)  # (N, G*G, D)


def class_update(last: LastMixing) -> Tensor:
    mixed = last.weights[:, :, :1] @ last.values  # (N, H, 1, D/H)
    update: Tensor = last.proj(mixed.transpose(1, 2).flatten(2))  # (N, 1, D)
    return update[:, 0]


def mlp_backward(gradient: Tensor, x: Tensor, last: LastMixing) -> Tensor:
    hidden = last.mlp.fc1(last.norm(x))  # (N, 4D)
    gradient = gradient @ last.mlp.fc2.weight  # (N, K, 4D)
    gradient = gradient * gelu_slope(hidden).unsqueeze(1)
    return layer_norm_backward(gradient @ last.mlp.fc1.weight, x, last.norm)  # (N, K, D)


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
