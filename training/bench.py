"""Is data the brake? Images/s of the whole training loop, beside bare passes of the network on one fixed batch."""

import resource
import tempfile
import time
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F

from model.network import Network, build
from training.config import Fit
from training.fit import TileSet, fit_tiles, read_tiles, see
from training.train import best_device, freeze


@dataclass(frozen=True)
class Speeds:
    bare_images_per_s: float
    loop_images_per_s: float
    peak_memory_mib: float

    @property
    def share(self) -> float:
        return self.loop_images_per_s / self.bare_images_per_s


def measure(config: Fit, steps: int) -> Speeds:
    """In the order bare, loop, bare, so that what else the machine does falls on both."""
    tiles = read_tiles(config)
    first, loop, second = (
        bare_speed(config, tiles, steps),
        loop_speed(config, tiles, steps),
        bare_speed(config, tiles, steps),
    )
    peak_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return Speeds((first + second) / 2, loop, peak_kib / 1024)


def bare_speed(config: Fit, tiles: TileSet, steps: int) -> float:
    return config.optimisation.batch * steps / sum(pass_seconds(build(config.model, len(tiles.classes)), config, steps))


def pass_seconds(net: Network, config: Fit, steps: int) -> list[float]:
    """Of passes forward and backward; one more before them pays for allocation."""
    device = best_device()
    net.to(device).train()
    freeze(net, config.optimisation.frozen)
    return [time_pass(net, config, device) for _ in range(steps + 1)][1:]


def time_pass(net: Network, config: Fit, device: torch.device) -> float:
    """On random images."""
    how = config.optimisation
    images = torch.rand(how.batch, 3, config.model.tile_px, config.model.tile_px, device=device)
    targets = torch.zeros(how.batch, dtype=torch.long, device=device)
    started = time.perf_counter()
    with torch.autocast(device.type, torch.bfloat16) if how.precision == "bf16" else nullcontext():
        loss = F.cross_entropy(see(net, images, how.token_drop).logits.float(), targets)
    torch.autograd.backward(loss)
    loss.item()
    return time.perf_counter() - started


def loop_speed(config: Fit, tiles: TileSet, steps: int) -> float:
    how = config.optimisation.model_copy(update={"steps": steps, "validate_every": steps, "checkpoint_every": steps})
    config = config.model_copy(update={"optimisation": how})
    with tempfile.TemporaryDirectory() as folder:
        fit_tiles(config, tiles, Path(folder) / "warm", None, title="warm-up")
        started = time.perf_counter()
        fit_tiles(config, tiles, Path(folder) / "timed", None, title="timed")
    return min(how.batch, len(tiles.tiles)) * steps / (time.perf_counter() - started)
