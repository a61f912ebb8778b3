import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression

from model.colours import COLOURS, ColourHead, name_colours
from model.graph import to_images
from training.colours import PENALTY, count_colours, fit_votes, share_of_fitted, teach
from training.rehearsal import Rehearsal

PINK, PURPLE, BLUE = (230, 150, 190), (110, 60, 140), (60, 80, 200)


def speckle(colour: tuple[int, int, int], n: int, seed: int = 0) -> torch.Tensor:
    """Tiles (n, 20, 20, 3) of one colour with some noise."""
    noise = torch.randint(-9, 10, (n, 20, 20, 3), generator=torch.Generator().manual_seed(seed))
    return (torch.tensor(colour) + noise).clamp(0, 255).to(torch.uint8)


def ask(head: ColourHead, tiles: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits (N, K), and how much of each tile is of known colours (N,)."""
    said = head(to_images(tiles)).mean(dim=1)
    return said[:, :-1] + head.bias, said[:, -1]


@pytest.fixture
def taught() -> ColourHead:
    head = ColourHead(patch_px=10, classes=3)
    tiles = torch.cat([speckle(PINK, 20), speckle(PURPLE, 20)])
    teach(head, tiles, torch.tensor([0] * 20 + [2] * 20), None, 0)
    return head


def test_it_tells_tissues_by_their_colours_and_knows_which_it_has_seen(taught):
    logits, known = ask(taught, torch.cat([speckle(PINK, 3, 1), speckle(PURPLE, 3, 1), speckle(BLUE, 3, 1)]))
    assert logits[:6].argmax(dim=1).tolist() == [0, 0, 0, 2, 2, 2]
    assert (known[:6] > 0.95).all() and (known[6:] == 0).all()
    assert (logits[6:] == taught.bias).all()


def test_a_class_without_a_tile_is_never_the_likeliest(taught):
    logits, _ = ask(taught, torch.cat([speckle(PINK, 3), speckle(BLUE, 3)]))
    assert (logits[:, 1] < logits[:, [0, 2]].amax(dim=1)).all()


def test_tiles_of_one_class_are_learnt_too():
    head = ColourHead(patch_px=10, classes=2)
    teach(head, speckle(PINK, 4), torch.ones(4, dtype=torch.int64), None, 0)
    assert ask(head, speckle(PINK, 2, 1))[0].argmax(dim=1).tolist() == [1, 1]


def test_a_colour_of_one_tile_or_of_few_pixels_is_not_known():
    head = ColourHead(patch_px=10, classes=2)
    tiles = torch.cat([speckle(PINK, 4), speckle(BLUE, 1)])
    tiles[:4, 0, :9] = torch.tensor(PURPLE, dtype=torch.uint8)  # nine pixels
    teach(head, tiles, torch.tensor([0, 1, 0, 1, 1]), None, 0)
    known = head.table[:, -1]
    assert set(known.tolist()) == {0.0, 1.0}
    for colour, n in ((BLUE, 1), (PURPLE, 1)):
        assert not known[name_colours(to_images(speckle(colour, n)))].any()


def test_rehearsed_cuts_weigh_as_much_as_they_are_told_and_make_no_colour_known():
    tiles, targets = torch.cat([speckle(PINK, 10), speckle(PURPLE, 10)]), torch.tensor([0] * 10 + [1] * 10)
    cuts = Rehearsal(torch.cat([speckle(BLUE, 50)]), torch.ones(50, dtype=torch.int64), torch.ones(50, 3))
    heads = [ColourHead(patch_px=10, classes=2) for _ in range(3)]
    for head, share in zip(heads, (0.0, 0.1, 0.5), strict=True):
        teach(head, tiles, targets, cuts, share)
    leads = [float(logits[0, 1] - logits[0, 0]) for logits, _ in (ask(head, speckle(BLUE, 1)) for head in heads)]
    assert leads[0] < leads[1] < leads[2] and leads[1] > 0
    assert all((ask(head, speckle(BLUE, 1))[1] == 0).all() for head in heads)


def test_its_problem_is_that_of_logistic_regression():
    rng = np.random.default_rng(0)
    shares, targets = rng.dirichlet(np.full(12, 0.3), size=60), rng.integers(3, size=60)
    weights = rng.uniform(0.1, 1, size=60)
    votes, bias = fit_votes(torch.from_numpy(shares), torch.from_numpy(targets), torch.from_numpy(weights), classes=3)
    theirs = LogisticRegression(C=1 / PENALTY, tol=1e-8, max_iter=5000).fit(shares, targets, sample_weight=weights)
    ours = shares @ votes.numpy() + bias.numpy()
    expected = theirs.decision_function(shares)
    ours, expected = (logits - logits.mean(axis=1, keepdims=True) for logits in (ours, expected))
    np.testing.assert_allclose(ours, expected, atol=0.02)  # its bias is free, ours is held back a little


def test_what_is_counted_is_what_the_network_looks_up():
    tiles = torch.randint(0, 256, (2, 20, 20, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    pixels = count_colours(tiles)
    assert pixels.shape == (2, COLOURS) and (pixels.sum(dim=1) == 400).all()
    head = ColourHead(patch_px=10, classes=2)  # ten isn't a multiple of three: it looks at all of them
    head.table[:, 0] = torch.arange(COLOURS)
    expected = (pixels.double() @ torch.arange(COLOURS).double()) / 400
    torch.testing.assert_close(head(to_images(tiles)).mean(dim=1)[:, 0].double(), expected)
    assert share_of_fitted(pixels).sum(dim=1).tolist() == pytest.approx([1, 1])
