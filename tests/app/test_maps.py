import numpy as np
import pytest

from app.maps import (
    LayerOutOfRange,
    TargetUnknown,
    find_class,
    look_back,
    look_from,
    merge_views,
    read_attention,
    read_evidence,
    read_occlusion,
)
from model.maps import cut_groups
from model.session import Explanations

RANDOM = np.random.default_rng(0)


def explain(**values):
    shapes = {
        "logits": (1, 3),
        "probabilities": (1, 3),
        "features": (1, 8),
        "attention": (1, 2, 4, 10, 10),
        "rollout": (1, 10, 10),
        "evidence": (1, 3, 10, 10),
    }
    return Explanations(**({name: RANDOM.random(shape, np.float32) for name, shape in shapes.items()} | values))


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


def test_attention_of_one_layer_and_head():
    whole = explain()
    np.testing.assert_array_equal(read_attention(whole, 0, 3).grid, whole.attention[0, 0, 3])
    last = read_attention(whole, None, "mean")
    np.testing.assert_allclose(last.grid, whole.attention[0, 1].mean(axis=0))
    assert (last.layer, last.head, last.class_specific, last.uniform_level) == (1, "mean", False, 0.01)


@pytest.mark.parametrize(("layer", "head", "text"), [(2, 0, "layer 2 .* has 2"), (0, 4, "head 4 .* has 4")])
def test_layers_and_heads_that_are_not_there(layer, head, text):
    with pytest.raises(LayerOutOfRange, match=text):
        read_attention(explain(), layer, head)


def test_evidence_is_of_the_target():
    whole = explain()
    drawable = read_evidence(whole, ["a", "b", "c"], 1)
    np.testing.assert_array_equal(drawable.grid, whole.evidence[0, 1])
    assert drawable.target == "b" and drawable.signed and drawable.class_specific


def test_unknown_class_is_refused_with_the_known_ones():
    assert find_class(["a", "b"], "b") == 1
    with pytest.raises(TargetUnknown, match="the classes are a, b"):
        find_class(["a", "b"], "A")


def test_occlusion_is_the_fall_of_the_logit():
    groups = cut_groups(10, 25)
    whole = explain(logits=np.array([[1.0, 5.0, 2.0]], np.float32))
    masked = [explain(logits=np.array([[0.0, 5.0 - group, 0.0]], np.float32)) for group in range(25)]
    drawable = read_occlusion(whole, masked, groups, ["a", "b", "c"], 1)
    np.testing.assert_array_equal(drawable.grid, groups)
