import csv
import re

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from model.vit import ViT, ViTConfig
from training.config import Optimisation
from training.train import (
    Diverged,
    FrozenAtRandom,
    UnknownLayer,
    batch_indices,
    build_optimiser,
    freeze,
    learning_rate,
    optimise,
    refuse_unfilled,
)

HOW = Optimisation(steps=6, batch=4, validate_every=2, checkpoint_every=2, warmup=0.5)
IMAGES = torch.rand(12, 3, 60, 60, generator=torch.Generator().manual_seed(0))
TARGETS = torch.arange(12) % 3


def make_vit():
    torch.manual_seed(0)
    return ViT(ViTConfig(tile_px=60, width=24, layers=2, heads=3, drop_path=0.5), 3)


def loss_of(model, step):
    chosen = batch_indices(12, 4, 0, step)
    noisy = IMAGES[chosen] + 0.1 * torch.randn(4, 3, 60, 60)
    return F.cross_entropy(model(noisy).logits, TARGETS[chosen])


class Killed(Exception):
    pass


def test_a_killed_run_ends_with_the_weights_of_one_that_was_not(tmp_path):
    def killed_at_five(model, step):
        if step == 5:
            raise Killed
        return loss_of(model, step)

    whole = optimise(make_vit(), loss_of, HOW, tmp_path / "whole")
    with pytest.raises(Killed):
        optimise(make_vit(), killed_at_five, HOW, tmp_path / "killed")
    torch.rand(7)  # whatever happened in between
    resumed = optimise(make_vit(), loss_of, HOW, tmp_path / "killed")
    for a, b in zip(whole.state_dict().values(), resumed.state_dict().values(), strict=True):
        assert torch.equal(a, b)


def test_a_log_without_a_terminal_tells_how_far_it_is(tmp_path, caplog):
    with caplog.at_level("INFO"):
        optimise(make_vit(), loss_of, HOW, tmp_path, lambda net: 0.5, title="small")
    told = [record.getMessage() for record in caplog.records]
    assert [text.partition(", ")[0] for text in told] == [f"small: step {step} of 6" for step in (2, 4, 6)]
    assert all(re.search(r"\d images/s, loss \d\.\d{3}", text) for text in told)


def test_a_finished_run_is_not_trained_again(tmp_path):
    first = optimise(make_vit(), loss_of, HOW, tmp_path)

    def never(model, step):
        raise AssertionError

    again = optimise(make_vit(), never, HOW, tmp_path)
    assert torch.equal(first.state_dict()["head.weight"], again.state_dict()["head.weight"])


def test_a_loss_that_is_not_finite_stops_with_step_and_rate(tmp_path):
    def explode_at_three(model, step):
        return loss_of(model, step) * (float("nan") if step == 3 else 1)

    with pytest.raises(Diverged, match=r"loss became nan .* at step 3 with learning rate \d.*under another name"):
        optimise(make_vit(), explode_at_three, HOW, tmp_path)
    assert torch.load(tmp_path / "latest.pt", weights_only=True)["step"] == 2


def test_a_gradient_that_is_not_finite_spoils_no_checkpoint(tmp_path):
    def explode_at_three(model, step):
        return loss_of(model, step) + (torch.sqrt(0 * model.head.bias.sum()) if step == 3 else 0)

    with pytest.raises(Diverged, match=r"gradient's norm nan at step 3 with learning rate \d"):
        optimise(make_vit(), explode_at_three, HOW.model_copy(update={"checkpoint_every": 1}), tmp_path)
    state = torch.load(tmp_path / "latest.pt", weights_only=True)
    assert state["step"] == 3 and all(tensor.isfinite().all() for tensor in state["weights"].values())


def test_the_curve_is_written_for_people(tmp_path):
    optimise(make_vit(), loss_of, HOW, tmp_path, validate=lambda model: 0.25)
    rows = list(csv.DictReader((tmp_path / "curve.csv").read_text().splitlines()))
    assert [row["step"] for row in rows] == ["2", "4", "6"]
    assert all(float(row["accuracy"]) == 0.25 and float(row["loss"]) > 0 for row in rows)


def test_it_learns(tmp_path):
    def separable(model, step):
        chosen = batch_indices(12, 4, 0, step)
        images = TARGETS[chosen].view(-1, 1, 1, 1).float().expand(-1, 3, 60, 60) / 2
        return F.cross_entropy(model(images).logits, TARGETS[chosen])

    how = HOW.model_copy(update={"steps": 60, "learning_rate": 3e-3, "validate_every": 60, "checkpoint_every": 60})
    vit = optimise(make_vit(), separable, how, tmp_path)
    images = torch.tensor([0, 0.5, 1]).view(3, 1, 1, 1).expand(-1, 3, 60, 60)
    assert vit(images).logits.argmax(1).tolist() == [0, 1, 2]


def test_biases_norms_and_positions_are_not_decayed():
    vit = make_vit()
    decayed, free = (group["params"] for group in build_optimiser(vit, HOW).param_groups)
    free_ids = {id(p) for p in free}
    assert {id(vit.pos_embed), id(vit.cls_token), id(vit.norm.weight), id(vit.head.bias)} <= free_ids
    assert id(vit.head.weight) not in free_ids
    assert len(decayed) + len(free) == len(list(vit.parameters()))


def test_the_learning_rate_climbs_and_comes_down():
    how = Optimisation(steps=100, warmup=0.1, learning_rate=1.0)
    rates = [learning_rate(step, how) for step in range(100)]
    assert rates[0] == pytest.approx(0.1) and rates[9] == pytest.approx(1.0)
    assert rates[9:] == sorted(rates[9:], reverse=True) and rates[-1] < 0.001


def test_an_epoch_sees_every_image_once():
    seen = torch.cat([batch_indices(12, 4, 0, step) for step in range(3)])
    assert sorted(seen.tolist()) == list(range(12))
    assert batch_indices(12, 4, 0, 0).tolist() != batch_indices(12, 4, 0, 3).tolist()
    assert len(batch_indices(3, 64, 0, 5)) == 3


def test_the_average_keeps_up_with_buffers(tmp_path):
    class Counted(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(1))
            self.register_buffer("seen", torch.zeros(1))

    def loss(model, step):
        model.seen += 1
        return (model.weight**2).sum()

    average = optimise(Counted(), loss, HOW.model_copy(update={"steps": 2}), tmp_path)
    assert average.state_dict()["seen"].item() > 0


def test_frozen_layers_stay_as_they_were_norms_included(tmp_path):
    torch.manual_seed(0)
    config = ViTConfig(tile_px=60, width=24, layers=1, heads=3, stem="efficientnet")
    start = ViT(config, 3)
    before = {name: tensor.clone() for name, tensor in start.state_dict().items()}
    optimise(start, loss_of, HOW.model_copy(update={"frozen": ["patch_embed.blocks.4."]}), tmp_path)
    after = start.state_dict()
    kept = {name for name in before if torch.equal(before[name], after[name])}
    assert kept == {name for name in before if name.startswith("patch_embed.blocks.4.")}


def test_what_no_weights_filled_is_not_frozen():
    refuse_unfilled(["blocks.0."], ["head.weight", "blocks.1.norm1.weight", "blocks.0.norm.num_batches_tracked"])
    refuse_unfilled([], ["blocks.0.norm1.weight"])
    with pytest.raises(FrozenAtRandom, match=r"keeps blocks\.0\.norm1\.weight as it came, but init has nothing for it"):
        refuse_unfilled(["blocks.0."], ["blocks.0.norm1.weight", "head.weight"])


def test_what_is_to_be_frozen_must_be_there():
    with pytest.raises(UnknownLayer, match="'stem', but no layer's name"):
        freeze(make_vit(), ["stem"])
