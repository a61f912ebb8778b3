"""The one training loop: AdamW, warm-up and cosine, an average of the weights, checkpoints that lose nothing.

    tissue-train fit configs/smoke.toml

All randomness of step i comes from (seed, i). So a run that was killed goes on from its last checkpoint and ends,
on a CPU, with the very weights of a run that was not.
"""

import copy
import csv
import logging
import math
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import TypeVar

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from training import checkpoint
from training.config import Optimisation

Net = TypeVar("Net", bound=nn.Module)
LossOf = Callable[[Net, int], Tensor]  # the model and a step -> its loss, on a batch of its own choice
Validate = Callable[[Net], float]

CURVE = ("step", "loss", "learning_rate", "images_per_s", "accuracy")  # its columns, a row per validation

log = logging.getLogger(__name__)


class Diverged(RuntimeError):
    pass


class UnknownLayer(ValueError):
    pass


class FrozenAtRandom(ValueError):
    pass


def best_device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def optimise(
    model: Net,
    loss_of: LossOf[Net],
    how: Optimisation,
    folder: Path,
    validate: Validate[Net] | None = None,
    title: str = "training",
) -> Net:
    """Trains `model` in place, from where `folder` says it stopped; returns the average of its weights."""
    # 1. everything that changes during the run
    device = next(model.parameters()).device
    optimiser = build_optimiser(model, how)
    average = copy.deepcopy(model).eval().requires_grad_(False)
    curve: list[dict[str, float]] = []
    start = 0

    # 2. where a run before this one stopped
    latest = folder / "latest.pt"
    if latest.exists():
        state = checkpoint.load(latest)
        model.load_state_dict(state["model"])
        average.load_state_dict(state["weights"])
        optimiser.load_state_dict(state["optimiser"])
        curve = state["curve"]
        start = state["step"]

    # 3. the loop
    autocast = torch.autocast(device.type, torch.bfloat16) if how.precision == "bf16" else nullcontext()
    console = Console(stderr=True)
    with progress_bar(console) as progress:
        bar = progress.add_task(title, total=how.steps, completed=start, note="")
        loss_sum, since, since_step = 0.0, time.perf_counter(), start
        model.train()
        freeze(model, how.frozen)
        for step in range(start, how.steps):
            torch.manual_seed(how.seed * 1_000_003 + step)
            rate = learning_rate(step, how)
            for group in optimiser.param_groups:
                group["lr"] = rate

            with autocast:
                loss = loss_of(model, step)
            optimiser.zero_grad(set_to_none=True)
            torch.autograd.backward(loss)
            norm = nn.utils.clip_grad_norm_(model.parameters(), how.clip)
            # Both at once, since this waits for the GPU, and before the step, so that no checkpoint is spoilt.
            if not torch.isfinite(loss + norm):
                raise Diverged(
                    f"the loss became {loss.item()} and its gradient's norm {norm.item()} at step {step} with learning "
                    f"rate {rate:.2e}: start again under another name with a lower optimisation.learning_rate"
                )
            optimiser.step()
            update_average(average, model, how.ema, step)
            loss_sum += loss.item()

            done = step + 1
            speed = how.batch * (done - since_step) / (time.perf_counter() - since)
            mean_loss = loss_sum / (done - since_step)
            note = f"{speed:.0f} images/s, loss {mean_loss:.3f}" + accuracy_note(curve)
            progress.update(bar, completed=done, note=note)

            if done % how.validate_every == 0 or done == how.steps:
                accuracy = math.nan if validate is None else validate(average)
                curve.append(dict(zip(CURVE, (done, mean_loss, rate, speed, accuracy), strict=True)))
                loss_sum, since, since_step = 0.0, time.perf_counter(), done
                if not console.is_terminal:  # where the bar appears at its end alone
                    log.info("%s: step %d of %d, %s", title, done, how.steps, note)
            if done % how.checkpoint_every == 0 or done == how.steps:
                state = {
                    "step": done,
                    "model": model.state_dict(),
                    "weights": average.state_dict(),
                    "optimiser": optimiser.state_dict(),
                    "curve": curve,
                }
                checkpoint.save(state, latest)
                write_curve(curve, folder / "curve.csv")
    return average


def freeze(model: nn.Module, frozen: list[str]) -> None:
    """Layers whose names begin so are not learnt, and their norms go on with the means they came with."""
    for beginning in frozen:
        layers = [layer for name, layer in model.named_modules() if name.removeprefix("vit.").startswith(beginning)]
        if not layers:
            raise UnknownLayer(f"optimisation.frozen names '{beginning}', but no layer's name begins so")
        for layer in layers:
            layer.eval().requires_grad_(False)


def refuse_unfilled(frozen: list[str], missing: list[str]) -> None:
    """`missing`: tensors that the weights at the start did not fill."""
    counted = ".num_batches_tracked"  # which no answer depends on
    chance = [name for name in missing if name.startswith(tuple(frozen)) and not name.endswith(counted)]
    if chance:
        raise FrozenAtRandom(
            f"optimisation.frozen keeps {chance[0]} as it came, but init has nothing for it, so that it stays at "
            "random: take it out of frozen, or set init to weights that have it"
        )


def build_optimiser(model: nn.Module, how: Optimisation) -> torch.optim.AdamW:
    """Weight decay on the matrices only: not on biases, norms, positions and the tokens that are learnt."""
    tables = {"cls_token", "mask_token", "pos_embed"}
    decayed: list[nn.Parameter] = []
    free: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        is_matrix = parameter.ndim >= 2 and name.rsplit(".", 1)[-1] not in tables
        (decayed if is_matrix else free).append(parameter)
    groups = [{"params": decayed, "weight_decay": how.weight_decay}, {"params": free, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=how.learning_rate, betas=(0.9, 0.999), fused=True)


def learning_rate(step: int, how: Optimisation) -> float:
    warmup_steps = max(1, round(how.warmup * how.steps))
    if step < warmup_steps:
        return how.learning_rate * (step + 1) / warmup_steps
    passed = (step - warmup_steps) / max(1, how.steps - warmup_steps)
    return how.learning_rate * 0.5 * (1 + math.cos(math.pi * passed))


@torch.no_grad()
def update_average(average: nn.Module, model: nn.Module, decay: float, step: int) -> None:
    decay = min(decay, (1 + step) / (10 + step))  # the first steps count little
    average_into = get_ema_multi_avg_fn(decay)  # type: ignore[no-untyped-call]
    # Norms also count batches, which have no average.
    kept, newest = (
        [tensor for tensor in net.state_dict().values() if tensor.is_floating_point()] for net in (average, model)
    )
    average_into(kept, newest, step)


def write_curve(rows: list[dict[str, float]], path: Path) -> None:
    """A copy of the checkpoint's curve, for people."""
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, CURVE)
        writer.writeheader()
        writer.writerows(rows)


def progress_bar(console: Console) -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[note]}"))
    return Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=console)


def accuracy_note(curve: list[dict[str, float]]) -> str:
    if not curve or math.isnan(curve[-1]["accuracy"]):
        return ""
    return f", validation accuracy {curve[-1]['accuracy']:.3f}"


def batch_indices(n: int, batch: int, seed: int, step: int) -> Tensor:
    """Which images step i sees: each epoch a fresh order of all of them, the last short batch left out."""
    batch = min(batch, n)
    per_epoch = n // batch
    epoch, place = divmod(step, per_epoch)
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed * 1_000_003 + epoch))
    return order[place * batch : (place + 1) * batch]
