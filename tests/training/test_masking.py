import numpy as np
import pytest
import torch

from model.vit import ViTConfig
from training.augment import keep_some_patches
from training.masking import CELLS, COLOURS, EDGES, Guesser, describe_patches, masked_loss
from training.pretrain import Pretrained
from training.synthetic import SHIPPED_KINDS, draw_tile

GRID = 10
CONFIG = ViTConfig(width=24, layers=2, heads=3)
TILES = torch.from_numpy(np.stack([draw_tile(kind, seed) for kind in SHIPPED_KINDS for seed in range(2)]))
DIRECTIONS = ("right", "left", "down", "up", "down right", "up left", "up right", "down left")


def strongest_direction(image):
    """Of what gets denser in an image (S, S), in its middle patch."""
    tile = (255 * torch.exp(-image)).round().to(torch.uint8)[None, ..., None].expand(-1, -1, -1, 3)
    edges = describe_patches(tile, GRID)[0, 55, :EDGES].view(8, CELLS**2).sum(dim=1)
    return DIRECTIONS[int(edges.argmax())]


def test_edges_tell_where_it_gets_denser():
    ramp = torch.linspace(0, 2, 150).expand(150, 150)
    assert strongest_direction(ramp) == "right"
    assert strongest_direction(ramp.flip(1)) == "left"
    assert strongest_direction(ramp.T) == "down"
    assert strongest_direction((ramp + ramp.T) / 2) == "down right"
    assert strongest_direction((ramp + ramp.T.flip(0)) / 2) == "up right"


def test_patches_are_numbered_as_the_tokens_are_and_cells_as_pixels():
    tile = torch.full((1, 150, 150, 3), 255, dtype=torch.uint8)
    tile[0, 30:45, 75:90] = 100  # patch (2, 5)
    found = describe_patches(tile, GRID)
    mean, spread = found[0, :, EDGES:].split(3, dim=1)
    dense = -np.log(101 / 256)
    assert mean[25].tolist() == pytest.approx([dense] * 3, abs=1e-5)
    assert mean.sum(dim=1).nonzero().tolist() == [[25]]
    assert spread[25].tolist() == pytest.approx([0] * 3, abs=0.01)
    right = found[0, 24].view(-1)[: CELLS**2].view(CELLS, CELLS)  # the patch to its left ends with its edge
    assert (right[:, 2] > 0.1).all() and (right[:, :2] == 0).all()


def test_glass_has_no_edges_and_tissue_edges_of_length_one():
    noise = torch.randint(250, 256, (1, 150, 150, 3), dtype=torch.uint8)
    assert describe_patches(noise, GRID)[..., :EDGES].norm(dim=2).max() < 0.5
    lengths = describe_patches(TILES, GRID)[..., :EDGES].norm(dim=2)
    assert 0.7 < lengths.median() < lengths.max() < 1


def test_the_loss_is_that_of_dropped_patches_alone():
    torch.manual_seed(0)
    guesser = Guesser(CONFIG, 32)
    tokens = torch.randn(len(TILES), 50, CONFIG.width)
    kept = torch.arange(50).expand(len(TILES), -1)
    before = masked_loss(guesser, tokens, kept, TILES)
    truth = guesser.truth(TILES)
    assert truth.mean(dim=(0, 1)).tolist() == pytest.approx([0] * (EDGES + COLOURS), abs=1e-4)
    errors = (guesser(tokens, kept) - truth).square()[:, 50:]
    assert before.item() == pytest.approx((errors[..., :EDGES].mean() + errors[..., EDGES:].mean()).item(), rel=1e-5)


def test_a_kept_patch_stands_at_its_own_place():
    torch.manual_seed(0)
    guesser = Guesser(CONFIG, 32).eval()
    tokens, kept = torch.randn(1, 50, CONFIG.width), keep_some_patches(1, 100, 0.5, torch.device("cpu"))
    order = torch.randperm(50)
    shuffled = guesser(tokens[:, order], kept[:, order])
    torch.testing.assert_close(shuffled, guesser(tokens, kept), rtol=1e-4, atol=1e-5)


def test_guesses_get_better_than_knowing_the_means_alone():
    torch.manual_seed(0)
    model = Pretrained(CONFIG, 0, []).vit
    guesser = Guesser(CONFIG, 32)
    optimiser = torch.optim.AdamW([*model.parameters(), *guesser.parameters()], lr=3e-3)
    images = TILES.permute(0, 3, 1, 2).float() / 255
    losses = []
    for _ in range(60):
        kept = keep_some_patches(len(TILES), 100, 0.5, torch.device("cpu"))
        patches = model.norm(model(images, visible=kept).tokens[-1])[:, 1:]
        loss = masked_loss(guesser, patches, kept, TILES)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[0] == pytest.approx(2, abs=0.1)
    assert np.mean(losses[-5:]) < 1.4
