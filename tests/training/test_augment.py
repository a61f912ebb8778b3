import numpy as np
import pytest
import torch
from pydantic import ValidationError

from model.graph import to_images
from training.augment import (
    Augmentation,
    augment,
    blend,
    choose,
    compress_some,
    dihedral,
    dye_some,
    gaussian_blur,
    keep_some_patches,
    mean_density,
    move,
    restain,
)

NOTHING = Augmentation(
    flips=False, crop=(1.0, 1.0), stain=0, light=0, blur=0, low_resolution=0, jpeg=0, mixup=0, cutmix=0
)


def make_tiles(n=4, s=30):
    return torch.randint(0, 256, (n, s, s, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def test_nothing_asked_for_leaves_every_pixel():
    tiles = make_tiles()
    torch.testing.assert_close(augment(tiles, NOTHING), to_images(tiles), atol=1e-5, rtol=0)


def test_everything_asked_for_stays_an_image():
    torch.manual_seed(0)
    how = Augmentation(stain=0.5, light=0.3, blur=1, low_resolution=1, jpeg=1)
    images = augment(make_tiles(), how)
    assert images.shape == (4, 3, 30, 30)
    assert images.min() >= 0 and images.max() <= 1.00001 and images.isfinite().all()


def test_the_same_seed_gives_the_same_images():
    how = Augmentation(blur=0.5, low_resolution=0.5, jpeg=0.5)
    results = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        results.append(augment(make_tiles(), how))
    assert torch.equal(results[0], results[1])
    assert not torch.equal(results[0], results[2])


def test_flips_are_the_eight_symmetries_and_move_no_pixel_off_its_centre():
    torch.manual_seed(0)
    tile = make_tiles(1)
    expected = [np.rot90(t, k) for k in range(4) for t in (tile[0].numpy(), tile[0].numpy()[::-1])]
    images = move(to_images(tile.expand(200, -1, -1, -1)), (1.0, 1.0), flips=True)
    found = (images * 255).round().byte().permute(0, 2, 3, 1).numpy()
    seen = {next(i for i, e in enumerate(expected) if np.array_equal(image, e)) for image in found}
    assert seen == set(range(8))


def test_the_symmetries_are_orthogonal():
    turns = dihedral(50, torch.device("cpu"))
    torch.testing.assert_close(turns @ turns.transpose(1, 2), torch.eye(2).expand(50, 2, 2))


def test_a_crop_never_leaves_the_tile():
    """With a frame of another colour outside the tile it would be seen; here reflection must never be needed."""
    ramp = torch.linspace(0, 1, 30).expand(1, 3, 30, 30)
    torch.manual_seed(0)
    for _ in range(20):
        row = move(ramp, (0.5, 0.9), flips=False)[0, 0, 0]
        assert (row.diff() > 0).all()


def test_stain_jitter_changes_colour_and_keeps_white_white_and_structure():
    torch.manual_seed(0)
    images = to_images(make_tiles(50))
    jittered = restain(images, 0.2, 0.0)
    assert (jittered - images).abs().mean() > 0.01
    correlations = [np.corrcoef(a.flatten(), b.flatten())[0, 1] for a, b in zip(images, jittered, strict=True)]
    assert min(correlations) > 0.5
    white = restain(torch.ones(50, 3, 2, 2), 0.1, 0.0)
    assert white.mean().item() == pytest.approx(1, abs=0.02)


def test_blur_keeps_the_mean_and_takes_the_detail():
    images = to_images(make_tiles())
    blurred = gaussian_blur(images, torch.full((4, 1), 1.5))
    torch.testing.assert_close(blurred.mean((2, 3)), images.mean((2, 3)), atol=0.02, rtol=0)
    assert (blurred.var() < 0.2 * images.var()).item()


def test_a_share_of_one_takes_all_and_of_zero_none():
    tiles = make_tiles()
    assert len(choose(tiles, 1.0)) == 4 and len(choose(tiles, 0.0)) == 0
    assert not torch.equal(compress_some(tiles, 1.0), tiles)
    assert torch.equal(compress_some(tiles, 0.0), tiles)


@pytest.mark.parametrize("kind", ["mixup", "cutmix"])
def test_blending_weighs_targets_as_it_weighs_pixels(kind):
    torch.manual_seed(3)
    images = torch.stack([torch.zeros(3, 30, 30), torch.ones(3, 30, 30)])
    targets = torch.eye(2)
    how = NOTHING.model_copy(update={kind: 1.0})
    mixed, wanted = blend(images, targets, how)
    assert wanted.sum(1).tolist() == pytest.approx([1, 1])
    assert mixed[0].mean().item() == pytest.approx(wanted[0, 1].item(), abs=1e-3)


def test_dropped_patches_are_a_random_subset_without_repeats():
    torch.manual_seed(0)
    kept = keep_some_patches(3, 100, 0.5, torch.device("cpu"))
    assert kept.shape == (3, 50)
    assert all(len(set(row.tolist())) == 50 for row in kept)
    assert kept[0].tolist() != kept[1].tolist()


def test_shares_beyond_one_are_refused():
    with pytest.raises(ValidationError, match="less than or equal to 1"):
        Augmentation(blur=1.5)


def paint(density, n=6):
    """Glass on the left, tissue of one density on the right."""
    images = torch.ones(n, 3, 8, 8)
    images[..., 4:] = torch.tensor([(256 * np.exp(-d) - 1) / 255 for d in density]).view(3, 1, 1)
    return images


def test_how_a_collection_looks_is_told_from_its_tissue_and_not_its_glass():
    tiles = (paint((0.5, 1.0, 0.4)) * 255).round().byte().permute(0, 2, 3, 1)
    torch.testing.assert_close(mean_density(tiles), torch.tensor([0.5, 1.0, 0.4]), atol=0.01, rtol=0)
    assert mean_density(torch.full((2, 8, 8, 3), 255, dtype=torch.uint8)).isfinite().all(), "glass alone has no look"


def test_dyed_tissue_lies_between_its_own_look_and_the_other_and_glass_stays_glass():
    torch.manual_seed(0)
    own, other = (0.5, 1.0, 0.4), (1.0, 1.5, 0.9)
    how = Augmentation(looks=[other], other_look=1.0)
    images = dye_some(paint(own, 200), torch.tensor(own).expand(200, 3), how)
    density = -torch.log((images[:, :, 0, 7] * 255 + 1) / 256)  # (N, 3)
    assert (density > torch.tensor(own) - 1e-4).all() and (density < torch.tensor(other) + 1e-4).all()
    assert (density[:, 2] > 0.6).float().mean() > 0.6, "most go most of the way"
    assert (images[..., :4] == 1).all()


def test_only_the_share_asked_for_is_dyed_and_nothing_without_looks():
    torch.manual_seed(0)
    own = torch.tensor((0.5, 1.0, 0.4)).expand(1000, 3)
    images = paint((0.5, 1.0, 0.4), 1000)
    dyed = dye_some(images, own, Augmentation(looks=[(1.0, 1.5, 0.9)], other_look=0.3))
    assert 0.25 < (dyed != images).flatten(1).any(dim=1).float().mean() < 0.35
    tiles = make_tiles()
    without = NOTHING.model_copy(update={"other_look": 1.0})
    torch.testing.assert_close(augment(tiles, without, own[:4]), to_images(tiles), atol=1e-5, rtol=0)
