import numpy as np

from app.views import look_back, look_from, merge_views
from tests.app.explanations import RANDOM, explain


def test_eight_views_are_all_different_and_each_comes_back():
    tile = RANDOM.random((10, 10))
    views = [look_from(tile, view) for view in range(8)]
    assert len({view.tobytes() for view in views}) == 8
    for number, view in enumerate(views):
        np.testing.assert_array_equal(look_back(view, number), tile)


def test_views_of_a_colour_tile_keep_their_channels():
    tile = RANDOM.integers(0, 256, (10, 10, 3), np.uint8)
    for view in range(8):
        seen = look_from(tile, view)
        assert seen.flags["C_CONTIGUOUS"]
        for channel in range(3):
            np.testing.assert_array_equal(look_from(tile[:, :, channel], view), seen[:, :, channel])


def test_merging_turns_maps_back_before_averaging():
    whole = explain()
    views = [
        explain(
            **{
                name: np.moveaxis(look_from(np.moveaxis(value, (-2, -1), (0, 1)), view), (0, 1), (-2, -1))
                for name, value in vars(whole).items()
                if name in ("attention", "rollout", "evidence")
            },
            logits=whole.logits,
        )
        for view in range(8)
    ]
    merged = merge_views(views)
    for name in ("attention", "rollout", "evidence", "logits"):
        np.testing.assert_allclose(getattr(merged, name), getattr(whole, name), rtol=1e-6)
