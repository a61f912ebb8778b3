"""Is data the brake? Images/s of the whole training loop, beside bare passes of the network on one fixed batch."""

import resource
import tempfile
import time
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F

from model.vit import ViT
from training.augment import keep_some_patches
from training.config import Fit
from training.fit import TileSet, fit_tiles, read_tiles
from training.train import best_device


@dataclass(frozen=True)
class Speeds:
    bare_images_per_s: float
    loop_images_per_s: float
    peak_memory_mib: float

    @property
    def share(self) -> float:
        return self.loop_images_per_s / self.bare_images_per_s


def measure(config: Fit, steps: int) -> Speeds:
    """Bare, loop, bare: what the machine does meanwhile falls on both."""
    tiles = read_tiles(config)
    first, loop, second = (
        bare_speed(config, tiles, steps),
        loop_speed(config, tiles, steps),
        bare_speed(config, tiles, steps),
    )
    peak_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return Speeds((first + second) / 2, loop, peak_kib / 1024)


def bare_speed(config: Fit, tiles: TileSet, steps: int) -> float:
    how, device = config.optimisation, best_device()
    vit = ViT(config.model, len(tiles.classes)).to(device)
    images = torch.rand(how.batch, 3, config.model.tile_px, config.model.tile_px, device=device)
    targets = torch.zeros(how.batch, dtype=torch.long, device=device)
    started = time.perf_counter()
    for step in range(steps + 1):
        if step == 1:
            started = time.perf_counter()  # the first pass pays for allocation
        with torch.autocast(device.type, torch.bfloat16) if how.precision == "bf16" else nullcontext():
            kept = keep_some_patches(how.batch, config.model.grid**2, how.token_drop, device)
            loss = F.cross_entropy(vit(images, kept=kept).logits.float(), targets)
        torch.autograd.backward(loss)
        loss.item()
    return how.batch * steps / (time.perf_counter() - started)


def loop_speed(config: Fit, tiles: TileSet, steps: int) -> float:
    how = config.optimisation.model_copy(update={"steps": steps, "validate_every": steps, "checkpoint_every": steps})
    config = config.model_copy(update={"optimisation": how})
    with tempfile.TemporaryDirectory() as folder:
        fit_tiles(config, tiles, Path(folder) / "warm", None, title="warm-up")
        started = time.perf_counter()
        fit_tiles(config, tiles, Path(folder) / "timed", None, title="timed")
    return min(how.batch, len(tiles.tiles)) * steps / (time.perf_counter() - started)
