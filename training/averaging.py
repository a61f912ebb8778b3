"""What pretraining learnt, averaged with what it started from.

A network that is fine-tuned forgets some of what served it elsewhere; the mean of its weights before and after does as
well on what it was tuned to, and better on what it never saw (WiSE-FT, arXiv 2109.01903). The way between them is flat
enough for that where one came from the other.
"""

import copy
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor, nn

from training import checkpoint
from training.train import freeze


@torch.no_grad()
def average_with_start(net: nn.Module, start: Path, share: float) -> None:
    """In place: so much of each weight comes from the file, where it has any; the others stay."""
    before = copy.deepcopy(net)
    checkpoint.initialise(before, start)
    old = before.state_dict()
    for name, tensor in net.state_dict().items():
        if tensor.is_floating_point():
            tensor.lerp_(old[name], share)


@torch.no_grad()
def measure_norms(net: nn.Module, batches: Iterable[Tensor], frozen: list[str]) -> None:
    """In place: the means and spreads that batch norms go by, of networks that nobody has trained as they are."""
    net.train()
    freeze(net, frozen)
    measured = [norm for norm in net.modules() if isinstance(norm, nn.BatchNorm2d) and norm.training]
    net.eval()
    usual = [norm.momentum for norm in measured]
    for norm in measured:
        norm.train()
        norm.reset_running_stats()
        norm.momentum = None  # each batch counts the same
    for images in batches:
        net(images)
    for norm, momentum in zip(measured, usual, strict=True):
        norm.momentum = momentum
    net.eval()
