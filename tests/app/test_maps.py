import numpy as np
import pytest

from app.maps import (
    LayerOutOfRange,
    TargetUnknown,
    UnsuitableOptions,
    check_range,
    choose_method,
    find_class,
    read_attention,
    read_evidence,
    read_occlusion,
)
from app.schemas import AttentionOptions, Masks
from model.occlusion import COARSE_GROUPS, cut_groups
from tests.app.explanations import explain


@pytest.mark.parametrize(
    ("options", "default", "method"),
    [
        ({}, "occlusion", "occlusion"),
        ({"tta": True}, "occlusion", "evidence"),  # which isn't merged over views
        ({"tta": True, "method": "occlusion"}, "evidence", "occlusion"),
        ({"layer": 0}, "evidence", "attention"),
        ({"head": 1}, "evidence", "attention"),
        ({"layout": "heads"}, "evidence", "attention"),
        ({"masks": 100}, "evidence", "occlusion"),
        ({"masks": 25}, "evidence", "evidence"),  # as API docs send what is usual, too
        ({"target": "Tumor"}, "evidence", "evidence"),
        ({"target": "Tumor"}, "attention", "evidence"),
        ({"target": "Tumor", "method": "attention"}, "evidence", "attention"),
    ],
)
def test_the_method_is_the_one_that_was_meant(options, default, method):
    assert choose_method(AttentionOptions(**options), default) == method


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"method": "evidence", "layer": 0}, "evidence has no layer, attention has"),
        ({"method": "attention", "masks": 100}, "attention has no masks, occlusion has"),
        ({"head": 0, "masks": 100}, "no method has head and masks"),
        ({"layout": "heads", "head": 1}, "shows all layers and heads"),
    ],
)
def test_an_option_that_would_be_overlooked_is_refused(options, text):
    with pytest.raises(UnsuitableOptions, match=text):
        choose_method(AttentionOptions(**options), "evidence")


def test_attention_of_one_layer_and_head():
    whole = explain()
    np.testing.assert_array_equal(read_attention(whole, 0, 3, 1.0).grid, whole.attention[0, 0, 3])
    last = read_attention(whole, None, "mean", 0.25)
    np.testing.assert_allclose(last.grid, whole.attention[0, 1].mean(axis=0))
    assert (last.layer, last.head, last.class_specific, last.uniform_level) == (1, "mean", False, 0.01)
    assert last.logit_share == 0.25


@pytest.mark.parametrize(("name", "index", "count"), [("layer", 2, 2), ("head", 4, 4), ("head", -1, 4)])
def test_layers_and_heads_that_are_not_there(name, index, count):
    check_range(name, count - 1, count)
    with pytest.raises(LayerOutOfRange, match=f"{name} {index} .* has {count}, numbered from 0 to {count - 1}"):
        check_range(name, index, count)


def test_evidence_is_of_the_target():
    whole = explain()
    drawable = read_evidence(whole, ["a", "b", "c"], 1)
    np.testing.assert_array_equal(drawable.grid, whole.evidence[0, 1])
    assert drawable.target == "b" and drawable.signed and drawable.class_specific


def test_unknown_class_is_refused_with_the_known_ones():
    assert find_class(["a", "b"], "b") == 1
    with pytest.raises(TargetUnknown, match="the classes are a, b"):
        find_class(["a", "b"], "A")


def test_maps_are_served_with_as_many_masks_as_they_were_judged_with():
    assert AttentionOptions().masks == Masks.COARSE == COARSE_GROUPS


def test_occlusion_is_the_fall_of_the_logit():
    groups = cut_groups(10, 25)
    whole = explain(logits=np.array([[1.0, 5.0, 2.0]], np.float32))
    masked = [explain(logits=np.array([[0.0, 5.0 - group, 0.0]], np.float32)) for group in range(25)]
    drawable = read_occlusion(whole, masked, groups, ["a", "b", "c"], 1)
    np.testing.assert_array_equal(drawable.grid, groups)
