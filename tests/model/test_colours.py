import pytest
import torch

from model.colours import ColourHead, name_colours, weigh_votes
from model.graph import to_images

RED, DARK_RED = (255, 0, 0), (239, 0, 0)  # of two neighbouring levels


def paint(*colours: tuple[int, int, int]) -> torch.Tensor:
    """Tiles of 4 x 4 px, whose left half has the first colour and whose right half the other: images (1, 3, 4, 4)."""
    tile = torch.zeros(1, 4, 4, 3, dtype=torch.uint8)
    tile[:, :, :2], tile[:, :, 2:] = (torch.tensor(colour, dtype=torch.uint8) for colour in colours)
    return to_images(tile)


def test_every_level_of_a_channel_has_its_place():
    levels = torch.arange(256, dtype=torch.uint8)
    for channel, step in enumerate((256, 16, 1)):
        tiles = torch.zeros(1, 1, 256, 3, dtype=torch.uint8)
        tiles[..., channel] = levels
        assert name_colours(to_images(tiles)).flatten().tolist() == [level // 16 * step for level in range(256)]


def test_half_the_precision_names_the_same_colours():
    levels = torch.arange(0, 256, 16, dtype=torch.uint8)
    tiles = torch.cartesian_prod(levels, levels, levels).view(1, 64, 64, 3)
    for shift in (0, 15):
        images = to_images(tiles + shift)
        assert name_colours(images).flatten().tolist() == list(range(4096))
        assert name_colours(images.half()).flatten().tolist() == list(range(4096))


def test_a_patch_says_what_its_pixels_say_on_average():
    head = ColourHead(patch_px=2, classes=2)
    red, dark_red = name_colours(paint(RED, DARK_RED))[0, 0, [0, -1]].tolist()
    head.table[red] = torch.tensor([3.0, -1.0, 1.0])
    head.table[dark_red] = torch.tensor([5.0, 0.0, 0.0])
    said = head(paint(RED, DARK_RED))  # (1, 4, 3)
    assert said[0, 0].tolist() == said[0, 2].tolist() == [3, -1, 1]
    assert said[0, 1].tolist() == said[0, 3].tolist() == [5, 0, 0]
    assert said.mean(dim=1)[0].tolist() == [4, -0.5, 0.5]


def test_votes_count_only_as_far_as_colours_are_known():
    shares = weigh_votes(0.2, torch.tensor([1.0, 0.9, 0.5, 0.0]))
    assert shares.tolist() == pytest.approx([0.2, 0.2 * 0.9**16, 0.2 * 0.5**16, 0])


def test_nothing_is_known_before_it_is_taught():
    assert not ColourHead(patch_px=2, classes=2)(paint(RED, DARK_RED)).any()


def test_of_a_patch_of_three_pixels_the_middle_one_is_looked_at():
    head = ColourHead(patch_px=3, classes=1)
    head.table[:, 0] = torch.arange(4096)
    images = torch.rand(2, 3, 6, 6)
    middle = name_colours(images)[:, 1::3, 1::3].flatten(1)  # (2, 4)
    assert head(images)[..., 0].tolist() == middle.tolist()
