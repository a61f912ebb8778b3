"""The judging itself is judged: on networks of a few lines whose truth is known."""

import shutil
from dataclasses import replace

import numpy as np
import pytest
from onnx import helper, numpy_helper
from PIL import Image

from model.artifact import JudgedMaps, MapScore, read_manifest
from model.session import Explanations, open_classifier
from training.maps import (
    NO_MODEL,
    Outlined,
    beat_all,
    choose_default,
    correlate_ranks,
    draw_model_maps,
    draw_no_model_maps,
    focus,
    judge_maps,
    lay_mosaic,
    lay_mosaics,
    overlap,
    rank_patches,
    read_outlined,
    removal_curves,
    removal_gap,
    shuffle_learnt,
    shuffle_weights,
    write_into_manifest,
)
from training.report import conclude, render_card
from training.synthetic import draw_tile
from training.trial import Trial

GRID = 10
TILE_PX = 20
RED, BLUE = (200, 40, 40), (40, 40, 200)


class OnePatch:
    """Says class 0 while it sees the patch in row 3, column 7, and class 1 without it; nothing else matters."""

    def explain(self, tiles, keep=None):
        keep = np.ones((len(tiles), GRID**2), bool) if keep is None else keep
        return explanations(np.where(keep[:, [37]], (5.0, -5.0), (-5.0, 5.0)), np.zeros((len(tiles), 2, GRID, GRID)))


class Colours:
    """Class 0 is red and class 1 is blue; every patch it sees has a vote, which is its evidence."""

    def explain(self, tiles, keep=None):
        n = len(tiles)
        keep = np.ones((n, GRID**2), bool) if keep is None else keep
        side = TILE_PX // GRID
        votes = (tiles[..., 0].astype(float) - tiles[..., 2]).reshape(n, GRID, side, GRID, side).mean(axis=(2, 4)) / 160
        shares = keep / np.maximum(keep.sum(axis=1, keepdims=True), 1)
        votes = votes * shares.reshape(n, GRID, GRID)
        evidence = np.stack([votes, -votes], axis=1)
        return explanations(3 * evidence.sum(axis=(2, 3)), 3 * evidence)


def explanations(logits, evidence):
    n = len(logits)
    powers = np.exp(logits)
    attention = np.tile(np.linspace(0, 1, GRID**2, dtype=np.float32).reshape(GRID, GRID), (n, 1, 1, 1, 1))
    return Explanations(
        logits, powers / powers.sum(axis=1, keepdims=True), logits, attention, attention[:, 0, 0], evidence
    )


def paint(colour, seed):
    """Tiles of one colour with some noise, as tissue has."""
    noise = np.random.default_rng(seed).integers(-30, 31, (TILE_PX, TILE_PX, 3))
    return (np.array(colour) + noise).clip(0, 255).astype(np.uint8)


@pytest.fixture
def rng():
    return np.random.default_rng(0)


@pytest.fixture
def trial():
    tiles = np.stack([paint((RED, BLUE)[i % 2], i) for i in range(40)])
    targets = np.arange(40) % 2
    return Trial(tiles, targets, targets, np.ones(40, np.float32), None, True, "forty painted tiles")


# -- removal -------------------------------------------------------------------------------------------------------


def test_the_one_patch_that_matters_found_first_gives_the_widest_gap(rng):
    truth = np.zeros((GRID, GRID))
    truth[3, 7] = 1
    tile = paint(RED, 0)
    found = removal_curves(OnePatch(), tile, 0, rank_patches(truth, rng))
    assert removal_gap(*found) == pytest.approx(0.9, abs=1e-3)  # gone in the first tenth, or not before the last
    missed = removal_curves(OnePatch(), tile, 0, rank_patches(-truth, rng))
    assert removal_gap(*missed) == pytest.approx(-0.9, abs=1e-3)


@pytest.mark.parametrize("draw", [lambda rng: rng.random((GRID, GRID)), lambda rng: np.zeros((GRID, GRID))])
def test_chance_and_a_map_without_contrast_have_no_gap_on_average(rng, draw):
    tile = paint(RED, 0)
    gaps = [
        removal_gap(*removal_curves(OnePatch(), tile, 0, rank_patches(draw(rng), rng))) for _ in range(400)
    ]  # standard error 0.03
    assert abs(np.mean(gaps)) < 0.1


def test_both_ways_begin_with_the_whole_tile_and_end_with_none_of_it(rng):
    most, least = removal_curves(Colours(), paint(RED, 1), 0, rank_patches(rng.random((GRID, GRID)), rng))
    assert most[0] == least[0] > 0.9
    assert most[-1] == least[-1] == 0.5


# -- focus ---------------------------------------------------------------------------------------------------------


def test_focus_is_the_share_of_what_is_positive():
    own = np.array([[True, False], [False, True]])
    assert focus(np.array([[3.0, 1.0], [-9.0, 0.0]]), own, ~own) == 0.75
    assert focus(np.where(own, 2.0, -1.0), own, ~own) == 1
    assert focus(np.full((2, 2), -1.0), own, ~own) == 0.5  # claims nothing


def test_quarters_lie_where_they_were_put():
    quarters = [np.full((2, 2, 3), value, np.uint8) for value in (10, 20, 30, 40)]
    tile = lay_mosaic(quarters, [3, 0, 2, 1])
    assert tile[::2, ::2, 0].tolist() == [[20, 40], [30, 10]]


def test_mosaics_know_which_patches_are_whose_and_use_no_tile_twice(trial, rng):
    mosaics = lay_mosaics(trial, GRID, 100, rng)
    assert len(mosaics) == 10  # of forty tiles
    for mosaic in mosaics:
        red = mosaic.tile[..., 0] > mosaic.tile[..., 2]
        np.testing.assert_array_equal(red, np.kron(mosaic.of_first, np.ones((2, 2), bool)))
        np.testing.assert_array_equal(mosaic.of_second, ~mosaic.of_first)
        assert mosaic.of_first.sum() == GRID**2 / 2 and (mosaic.first, mosaic.second) == (0, 1)


def test_in_a_grid_of_odd_side_the_middle_is_nobodys(trial, rng):
    mosaic = lay_mosaics(trial, 5, 1, rng)[0]
    assert mosaic.of_first.sum() == mosaic.of_second.sum() == 8
    assert not (mosaic.of_first | mosaic.of_second)[2].any()


def test_an_unsure_answer_stands_for_no_class(trial, rng):
    unsure = replace(trial, confidence=trial.confidence * 0.4, labelled=False)
    assert lay_mosaics(unsure, GRID, 100, rng) == []


# -- glands --------------------------------------------------------------------------------------------------------


def test_overlap_compares_as_many_patches_as_the_truth_has(rng):
    truth = np.array([[True, True], [False, False]])
    assert overlap(np.array([[9.0, 8.0], [1.0, 2.0]]), truth, rng) == 1
    assert overlap(np.array([[9.0, 1.0], [8.0, 2.0]]), truth, rng) == pytest.approx(1 / 3)
    assert overlap(-truth.astype(float), truth, rng) == 0


def test_outlined_fields_are_cut_at_the_tiles_scale_and_clear_ones_left_out(tiny_artifact, tmp_path):
    mask = np.zeros((200, 300), np.uint8)
    mask[:, :150] = 255
    for name, pixels in (("image", np.full((200, 300, 3), 200, np.uint8)), ("mask", mask), ("none", 0 * mask)):
        Image.fromarray(pixels).save(tmp_path / f"{name}.png")
    (tmp_path / "fields.csv").write_text("image,mask,patient\nimage.png,mask.png,7\nimage.png,none.png,8\n")
    (field,) = read_outlined(tmp_path / "fields.csv", 0.495, read_manifest(tiny_artifact))
    assert field.tile.shape == (150, 150, 3) and field.patient == "7"
    np.testing.assert_array_equal(field.is_gland, np.tile(np.arange(10) < 5, (10, 1)))


def test_a_map_of_red_finds_red_glands(trial):
    tile = np.where(np.arange(TILE_PX)[:, None, None] < TILE_PX // 2, RED, BLUE).astype(np.uint8)
    tile = np.broadcast_to(tile, (TILE_PX, TILE_PX, 3)).copy()
    tile[-2:] = RED  # so that red is the answer
    fields = [Outlined(tile, np.tile(np.arange(GRID) < 5, (GRID, 1)).T, patient) for patient in "ab"]
    judged = judge_maps(Colours(), Colours(), trial, 1, 1, seed=0, fields=fields).judged
    assert scores_of(judged, "glands")["evidence"].value > 0.7 > scores_of(judged, "glands")["random"].value
    assert scores_of(judged, "glands")["evidence"].n == 2 and "2 fields of 2 patients" in judged.protocol


# -- all of it -----------------------------------------------------------------------------------------------------


def scores_of(judged, metric):
    return {score.map: score for score in judged.scores if score.metric == metric}


def test_a_network_that_votes_by_colour_is_seen_through_by_evidence_and_occlusion_alone(trial):
    judged = judge_maps(Colours(), Colours(), trial, per_class=5, mosaics=10, seed=0).judged
    found = scores_of(judged, "focus")
    assert found["evidence"].value == 1
    assert 0.98 < found["occlusion"].value < 1  # its groups of four patches lie across the quarters' edges
    for blind in ("attention", "rollout", *NO_MODEL):
        assert found[blind].value == pytest.approx(0.5)
    assert scores_of(judged, "other_class")["attention"].value == pytest.approx(1)
    assert scores_of(judged, "other_class")["evidence"].value == pytest.approx(-1)
    assert scores_of(judged, "random_weights")["evidence"].value == pytest.approx(1)  # here nothing was shuffled
    assert "removal on 10 of them" in judged.protocol and "10 of 10 mosaics" in judged.protocol


def test_judging_again_with_the_same_seed_gives_the_same_numbers(trial):
    first, again = (judge_maps(Colours(), Colours(), trial, 2, 4, seed=3).judged for _ in range(2))
    assert first == again


def test_tiles_of_named_slides_are_drawn_with_their_slide(trial):
    judged = judge_maps(Colours(), Colours(), replace(trial, slides=np.arange(40) // 20), 15, 10, seed=0).judged
    for metric in ("removal", "other_class", "random_weights", "other_tile"):
        assert scores_of(judged, metric)["evidence"].n == 2
    assert scores_of(judged, "focus")["evidence"].n == 10  # the mosaics


def score(name, metric, value, half=0.01):
    return MapScore(map=name, metric=metric, value=value, low=value - half, high=value + half, n=9)


@pytest.fixture
def judged():
    """Evidence wins on both, rollout on removal alone, occlusion's interval touches."""
    removal = {"attention": 0.0, "rollout": 0.3, "evidence": 0.2, "occlusion": 0.4} | dict.fromkeys(NO_MODEL, 0.1)
    focus_of = {"attention": 0.5, "rollout": 0.5, "evidence": 0.6, "occlusion": 0.515} | dict.fromkeys(NO_MODEL, 0.5)
    scores = [score(name, "removal", value) for name, value in removal.items()]
    scores += [score(name, "focus", value) for name, value in focus_of.items()]
    return JudgedMaps(protocol="nine tiles", beat_all=beat_all(scores), scores=scores)


def test_the_winner_is_above_every_map_without_a_model_on_both(judged):
    assert judged.beat_all == ["evidence"]
    better = [*judged.scores, score("random", "removal", 0.5)]  # one blind map that does well is enough
    assert beat_all(better) == []


def test_the_verdict_in_words_names_winner_and_losers(judged):
    words = conclude(judged)
    assert "the intervals apart: `evidence`" in words
    assert "`attention` does no better" in words
    assert "`rollout` says nothing about which patches are of which class" in words


def test_a_map_of_26_passes_has_to_be_clearly_better_to_become_the_default(judged):
    scores = [s for s in judged.scores if (s.map, s.metric) != ("occlusion", "focus")]
    for value, best in ((0.615, "evidence"), (0.625, "occlusion")):
        scored = [*scores, score("occlusion", "focus", value)]
        assert beat_all(scored) == ["occlusion", "evidence"]
        found = judged.model_copy(update={"scores": scored, "beat_all": beat_all(scored)})
        assert choose_default(found) == best
    assert choose_default(judged) == "evidence"
    assert choose_default(judged.model_copy(update={"beat_all": ["occlusion"]})) == "occlusion"
    assert choose_default(judged.model_copy(update={"beat_all": []})) is None


def test_what_was_judged_is_kept_in_the_manifest_and_chooses_the_default(judged, tiny_artifact, tmp_path):
    folder = tmp_path / "tiny"
    shutil.copytree(tiny_artifact, folder)
    scores = [s for s in judged.scores if (s.map, s.metric) != ("occlusion", "focus")] + [
        score("occlusion", "focus", 0.7)
    ]
    occlusion_best = judged.model_copy(update={"beat_all": ["occlusion", "evidence"], "scores": scores})
    write_into_manifest(folder, occlusion_best)
    manifest = open_classifier(folder, device="cpu").manifest
    assert manifest.maps.default == "occlusion" and manifest.maps.judged == occlusion_best
    card = render_card(manifest)
    assert "| rollout | 0.300 [0.290, 0.310] | 0.500 [0.490, 0.510] |" in card and "nine tiles" in card

    write_into_manifest(folder, judged.model_copy(update={"beat_all": []}))
    assert read_manifest(folder).maps.default == "occlusion"  # nothing better is known
    assert "No method is better" in render_card(read_manifest(folder))


def test_a_manifest_that_was_never_judged_says_so(tiny_artifact):
    assert "was not measured" in render_card(read_manifest(tiny_artifact))


# -- maps ----------------------------------------------------------------------------------------------------------


def test_maps_without_a_model_show_what_they_are_named_for(rng):
    tile = np.full((150, 150, 3), 240, np.uint8)
    tile[15:30, 30:45] = (60, 40, 120)  # a nucleus' colour
    tile[75:90, 75:90:2] = 200  # stripes
    maps = draw_no_model_maps(tile, GRID, rng)
    assert set(maps) == set(NO_MODEL)
    assert maps["haematoxylin"].argmax() == 1 * GRID + 2
    assert maps["edge"].argmax() == 5 * GRID + 5
    assert maps["centre"][4:6, 4:6].min() == maps["centre"].max()


def test_shuffled_weights_answer_otherwise_and_the_same_each_time(tiny_artifact):
    tile = draw_tile(0, seed=1)
    classifier = open_classifier(tiny_artifact, device="cpu")
    trained = draw_model_maps(classifier, tile)
    shuffled, again = (draw_model_maps(shuffle_weights(classifier, tiny_artifact, seed=2), tile) for _ in range(2))
    for name, grids in trained.items():
        assert grids.shape == shuffled[name].shape == (6, 10, 10)
        assert not np.allclose(grids, shuffled[name])
        np.testing.assert_array_equal(shuffled[name], again[name])


def test_shuffling_what_is_learnt_leaves_the_picture_whole(rng):
    """An enlargement's constants are as large as weights; everything that the network reads is one."""
    scale, kernels, bias, head = (rng.random(shape).astype(np.float32) for shape in ((9, 1), (8, 3, 3, 3), 8, (8, 2)))
    values = {"scale": scale, "kernels": kernels, "bias": bias, "head": head}
    nodes = [
        helper.make_node("Mul", ["tiles", "scale"], ["picture"]),
        helper.make_node("Conv", ["picture", "kernels", "bias"], ["patches"]),
        helper.make_node("MatMul", ["patches", "head"], ["logits"]),
    ]
    tensors = [numpy_helper.from_array(array, name) for name, array in values.items()]
    graph = helper.make_graph(nodes, "network", [], [], tensors)
    shuffle_learnt(graph, rng)
    found = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    for name, array in values.items():
        np.testing.assert_array_equal(np.sort(found[name], axis=None), np.sort(array, axis=None))
    assert [name for name in values if (found[name] == values[name]).all()] == ["scale"]


def test_ranks_are_compared_and_ties_share_theirs():
    a = np.array([[1.0, 2.0], [2.0, 8.0]])
    assert correlate_ranks(a, a**3) == pytest.approx(1)
    assert correlate_ranks(a, -a) == pytest.approx(-1)
    assert correlate_ranks(a, np.ones((2, 2))) == 0
    assert correlate_ranks(np.array([1.0, 2, 3]), np.array([1.0, 1, 3])) == pytest.approx(np.sqrt(3) / 2)
