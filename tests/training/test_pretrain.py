import csv
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from model.msht import MSHTConfig
from model.network import build
from model.vit import ViTConfig
from training import checkpoint
from training.config import BadConfig, Masked, Optimisation, Pretrain, Rule, Source
from training.data import BadTable, UnusableImage
from training.pretrain import (
    NO_LABEL,
    Cutter,
    Field,
    Pretrained,
    obeys,
    open_sources,
    pretrain,
    read_points,
    read_source,
    symmetry,
)
from training.train import optimise

GRID, TILE_PX = 4, 60
MODEL = ViTConfig(tile_px=TILE_PX, width=24, layers=2, heads=3, pool="both")
HOW = Optimisation(steps=3, batch=6, token_drop=0.5, validate_every=3, checkpoint_every=3)


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> Path:
    """Ten small images of each kind of annotation, with what is marked where it can be seen."""
    root: Path = tmp_path_factory.mktemp("sources")
    rng = np.random.default_rng(0)
    points, glands = [], []
    for n in range(10):
        for folder in ("coarse/dark", "coarse/light", "nuclei/images", "glands/images", "glands/masks"):
            (root / folder).mkdir(parents=True, exist_ok=True)
        for label, grey in (("dark", 60), ("light", 200)):
            noise = rng.integers(-20, 20, (80, 80, 3)) + grey
            Image.fromarray(noise.astype(np.uint8)).save(root / "coarse" / label / f"{n}.png")
        field = np.full((100, 120, 3), 220, np.uint8)
        for x, y in rng.integers(5, 95, (6, 2)):
            field[y - 2 : y + 3, x - 2 : x + 3] = (80, 40, 120)
            points.append({"image": f"{n}.png", "x": x, "y": y, "kind": "round" if x < 50 else "long"})
        Image.fromarray(field).save(root / "nuclei/images" / f"{n}.png")
        mask = np.zeros((100, 120), bool)
        mask[:, :60] = True
        Image.fromarray(mask).save(root / "glands/masks" / f"{n}.png")
        Image.fromarray(np.where(mask[..., None], 120, 230).astype(np.uint8).repeat(3, 2)).save(
            root / "glands/images" / f"{n}.png"
        )
        grade = "benign" if n % 2 else "malignant"
        glands.append({"image": f"images/{n}.png", "mask": f"masks/{n}.png", "patient": f"p{n // 2}", "grade": grade})
    for name, rows in (("nuclei/points.csv", points), ("glands/fields.csv", glands)):
        with (root / name).open("w", newline="") as file:
            writer = csv.DictWriter(file, rows[0].keys())
            writer.writeheader()
            writer.writerows(rows)
    return root


def make_config(folders: Path, **changes) -> Pretrain:
    sources = [
        Source(kind="classes", folder=folders / "coarse", share=1, zoom=(0.7, 1.0)),
        Source(kind="points", folder=folders / "nuclei", table="points.csv", mpp=0.5, share=1),
        Source(kind="masks", folder=folders / "glands", table="fields.csv", mpp=0.5, share=1),
    ]
    rules = [
        Rule(label="Round", kind="points", at_least={"round": 3}, absent=["long"]),
        Rule(label="Gland", kind="masks", at_least={"malignant": 0.6}),
    ]
    settings = {
        "optimisation": HOW,
        "tile_mpp": 0.5,
        "classes": ["Round", "Gland"],
        "rules": rules,
        "model": MODEL,
    }
    return Pretrain(name="x", **{"sources": sources, **settings, **changes})


def run(config: Pretrain, folder: Path) -> Pretrained:
    return pretrain(config, open_sources(config), folder)


def cutter(folders: Path, kind: str) -> Cutter:
    config = make_config(folders)
    source = next(source for source in config.sources if source.kind == kind)
    return Cutter(read_source(source), config)


def test_points_land_in_the_patch_they_lie_in(folders):
    points = cutter(folders, "points")
    long, round_ = points.collection.names
    assert (long, round_) == ("long", "round")
    field = Field(
        np.zeros((100, 120, 3), np.uint8), points=np.array([[10, 20, 1], [59, 59, 0], [61, 10, 1]], np.float32)
    )
    cut = points.cut_at(field, left=0, top=0, side=60)  # patches of 15 px
    assert cut.patches[1, 0].tolist() == [0, 1]
    assert cut.patches[3, 3].tolist() == [1, 0]
    assert cut.patches.sum() == 2  # the third lies outside


def test_gland_share_is_that_of_the_mask_under_each_patch(folders):
    masks = cutter(folders, "masks")
    field = masks.collection.fields[0]
    cut = masks.cut_at(field, left=30, top=0, side=60)  # the gland ends at x = 60, half way
    assert cut.patches[:, :2, 0] == pytest.approx(1) and cut.patches[:, 2:, 0] == pytest.approx(0)
    assert (cut.patches[..., 1] == field.grade).all()


@pytest.mark.parametrize("turn", range(8))
def test_tile_and_patches_turn_together(folders, turn):
    masks = cutter(folders, "masks")
    field = masks.collection.fields[0]
    cut = masks.cut_at(field, left=30, top=0, side=60, turn=turn)
    dark = cut.tile[7::15, 7::15, 0] < 175  # at the patches' centres
    np.testing.assert_array_equal(dark, cut.patches[..., 0] > 0.5)


def test_the_eight_symmetries_differ():
    array = np.arange(6).reshape(2, 3, 1)
    assert len({symmetry(array, turn).tobytes() + bytes(symmetry(array, turn).shape) for turn in range(8)}) == 8


def test_a_cut_has_the_tiles_magnification(folders):
    points = cutter(folders, "points")
    assert points.side_px(points.collection.fields[0]) == 60
    coarse = cutter(folders, "classes")
    assert coarse.side_px(coarse.collection.fields[0]) == 80  # no mpp: the whole image


def test_rules_ask_for_amounts_shares_and_absence():
    rule = Rule(label="x", kind="points", at_least={"a": 5}, share={"a": 0.5}, absent=["c"])
    assert obeys({"a": 6, "b": 5, "c": 0}, rule)
    assert not obeys({"a": 4, "b": 0, "c": 0}, rule)
    assert not obeys({"a": 6, "b": 6, "c": 0}, rule)
    assert not obeys({"a": 9, "b": 0, "c": 1}, rule)


def test_weak_labels_come_from_what_lies_in_the_cut(folders):
    masks = cutter(folders, "masks")
    benign, malignant = masks.collection.names
    assert (benign, malignant) == ("benign", "malignant")
    field = next(field for field in masks.collection.fields if field.grade == 1)
    assert masks.cut_at(field, left=0, top=0, side=60).weak_label == 1
    assert masks.cut_at(field, left=60, top=0, side=60).weak_label == NO_LABEL


def test_no_patient_is_learnt_and_held_out_at_once(folders):
    source = Source(kind="masks", folder=folders / "glands", table="fields.csv", mpp=0.5, share=1, held_out=0.4)
    collection = read_source(source)
    assert len(collection.fields) == 6 and len(collection.held_out) == 4  # two of five patients, two fields each


def test_nuclei_of_one_patient_stay_together_where_the_table_names_them(folders, tmp_path):
    shutil.copytree(folders / "nuclei", tmp_path / "nuclei")
    table = tmp_path / "nuclei" / "points.csv"
    head, *rows = table.read_text().splitlines()
    table.write_text(
        "\n".join([f"{head},patient", *(f"{row},{'first' if row[0] < '5' else 'second'}" for row in rows)])
    )
    source = Source(kind="points", folder=tmp_path / "nuclei", table="points.csv", mpp=0.5, share=1, held_out=0.5)
    assert [patient for patient, _ in read_points(source)[1]] == ["first"] * 5 + ["second"] * 5
    assert len(read_source(source).fields) == len(read_source(source).held_out) == 5


def test_how_smooth_labels_are_is_the_configs_choice(folders, tmp_path):
    first, second = (
        run(make_config(folders, optimisation=smooth), tmp_path / str(n)).state_dict()["heads.coarse.weight"]
        for n, smooth in enumerate(HOW.model_copy(update={"label_smoothing": share}) for share in (0.0, 0.5))
    )
    assert not torch.equal(first, second)


@pytest.fixture
def paired(folders):
    """Coarse fields with a table of near duplicates, still to be written."""
    table = folders / "coarse" / "pairs.csv"
    yield table, Source(kind="classes", folder=folders / "coarse", table="pairs.csv", share=1, held_out=0.5)
    table.unlink()


@pytest.mark.parametrize("seen_from", ["coarse/dark/", "dark/", "dark\\"])
def test_near_duplicates_stay_on_one_side(paired, seen_from):
    table, source = paired
    table.write_text("a,b\n" + "".join(f"{seen_from}{n}.png,{seen_from}{n + 1}.png\n" for n in range(9)))
    dark_learnt = sum(field.label == 0 for field in read_source(source).fields)
    assert dark_learnt in (0, 10)  # a chain of pairs is one group


@pytest.mark.parametrize(
    ("text", "complaint"),
    [("a,b\n0.png,1.png\n", r"names no file that is there; the first is 0\.png"), ("a\n0.png\n", "has no column b")],
)
def test_a_table_that_would_not_be_obeyed_is_refused(paired, text, complaint):
    table, source = paired
    table.write_text(text)
    with pytest.raises(BadTable, match=complaint):
        read_source(source)


def test_images_are_found_and_read_as_those_to_be_classified_are(tmp_path):
    see_through = np.zeros((40, 40, 4), np.uint8)
    for place in ("a/1.png", "b/1.png", "a/.thumbs/1.png", ".cache/1.png"):
        (tmp_path / place).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(see_through).save(tmp_path / place)
    (tmp_path / "a" / "notes.txt").write_text("of no image")
    collection = read_source(Source(kind="classes", folder=tmp_path, share=1, held_out=0))
    assert collection.names == ["a", "b"] and [field.label for field in collection.fields] == [0, 1]
    assert all((field.pixels == 255).all() for field in collection.fields)  # glass, as it is when it is served
    (tmp_path / "b" / "2.png").write_text("no image")
    with pytest.raises(UnusableImage, match=r"2\.png: This is no image"):
        read_source(collection.source)


def test_it_runs_and_leaves_a_trunk_that_fit_can_start_from(folders, tmp_path):
    torch.manual_seed(0)
    model = run(make_config(folders), tmp_path)
    assert isinstance(model, Pretrained)
    weights = torch.load(tmp_path / "latest.pt", weights_only=True)["weights"]
    assert {"vit.head.weight", "vit.pos_embed", "heads.coarse.weight", "heads.nuclei.weight"} <= weights.keys()


def test_msht_learns_the_same_way_and_starts_from_all_it_learnt(folders, tmp_path):
    model = MSHTConfig(tile_px=TILE_PX, channels=(8, 8, 8, 16), width=24, heads=3, pool="both")
    run(make_config(folders, model=model), tmp_path)
    missing, unused = checkpoint.initialise(build(model, classes=2), tmp_path / "latest.pt")
    assert missing == [] and all(name.startswith("heads.") for name in unused)


def test_the_dense_heads_learn_where_things_are(folders, tmp_path):
    how = Optimisation(steps=60, batch=12, learning_rate=3e-3, ema=0.9, validate_every=60, checkpoint_every=60)
    config = make_config(folders, optimisation=how)
    model = run(config, tmp_path)
    masks = cutter(folders, "masks")
    cut = masks.cut_at(masks.collection.fields[0], left=30, top=0, side=60)
    with torch.no_grad():
        out = model.vit(torch.tensor(cut.tile)[None].permute(0, 3, 1, 2).float() / 255)
        share = model.heads["glands"](model.vit.norm(out.tokens[-1])[0, 1:])[:, 0].sigmoid().view(GRID, GRID)
    assert share[:, :2].mean() > share[:, 2:].mean() + 0.5


def test_a_source_without_images_or_table_is_named(folders, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(BadConfig, match="holds no images of kind 'classes'"):
        read_source(Source(kind="classes", folder=tmp_path / "empty", share=1))
    with pytest.raises(BadConfig, match="needs a table"):
        read_source(Source(kind="points", folder=folders / "nuclei", share=1))


def test_more_grades_than_the_loss_tells_apart_are_refused(folders, tmp_path):
    shutil.copytree(folders / "glands", tmp_path / "glands")
    table = tmp_path / "glands" / "fields.csv"
    table.write_text(table.read_text().replace("benign", "adenoma", 1))
    source = Source(kind="masks", folder=tmp_path / "glands", table="fields.csv", mpp=0.5, share=1)
    with pytest.raises(BadConfig, match=r"3 grades \(adenoma, benign, malignant\), expected 2 at most: merge some"):
        read_source(source)


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"at_least": {"rund": 3}}, "'Round' asks for 'rund', but what is marked in .*nuclei' is 'long', 'round'"),
        ({"share": {"rund": 0.5}}, "asks for 'rund'"),
        ({"absent": ["lang", "rund"]}, "asks for 'lang', 'rund'"),
        ({"label": "B"}, r"the label 'B', which is none of the classes \['Round', 'Gland'\]"),
    ],
)
def test_rules_that_ask_for_what_there_is_not_are_refused_at_the_start(folders, changes, complaint):
    config = make_config(folders)
    rule = config.rules[0].model_copy(update=changes)
    with pytest.raises(BadConfig, match=complaint):
        open_sources(config.model_copy(update={"rules": [rule]}))


@pytest.mark.parametrize("name", ["nuc.v1", "train"])
def test_a_folder_that_no_head_can_be_called_after_is_refused(folders, tmp_path, name):
    shutil.copytree(folders / "nuclei", tmp_path / name)
    source = Source(kind="points", folder=tmp_path / name, table="points.csv", mpp=0.5, share=1)
    with pytest.raises(BadConfig, match=f"gives its head the name '{name}', which torch can't use"):
        open_sources(make_config(folders, sources=[source], rules=[]))


def test_a_source_of_which_nothing_is_left_to_learn_from_is_refused(folders):
    source = Source(kind="classes", folder=folders / "coarse", share=1, held_out=1.0)
    with pytest.raises(BadConfig, match=r"20 groups of images, and held_out = 1 leaves none"):
        read_source(source)


def with_unlabelled(folders: Path) -> list[Source]:
    unlabelled = Source(kind="images", folder=folders / "nuclei" / "images", mpp=0.5, share=1)
    return [*make_config(folders).sources, unlabelled]


def test_guessing_changes_nothing_of_what_the_others_start_from(folders):
    collections = [read_source(source) for source in with_unlabelled(folders)]
    models = []
    for masked in (None, Masked()):
        torch.manual_seed(0)
        models.append(Pretrained(MODEL, 2, collections, masked).state_dict())
    without, guessing = models
    assert {name.split(".")[0] for name in guessing.keys() - without.keys()} == {"guesser"}
    assert all(torch.equal(tensor, guessing[name]) for name, tensor in without.items())


def test_images_without_labels_are_learnt_from_and_the_decoder_stays_behind(folders, tmp_path):
    run(make_config(folders, sources=with_unlabelled(folders), masked=Masked()), tmp_path)
    missing, unused = checkpoint.initialise(build(MODEL, classes=2), tmp_path / "latest.pt")
    assert missing == []
    assert {name.split(".")[0] for name in unused} == {"heads", "guesser"}
    assert not any("images" in name for name in unused)  # no head where there is no label


def test_a_killed_run_that_guesses_ends_with_the_weights_of_one_that_was_not(folders, tmp_path, monkeypatch):
    how = Optimisation(steps=4, batch=6, token_drop=0.5, validate_every=2, checkpoint_every=2)
    config = make_config(folders, sources=with_unlabelled(folders), masked=Masked(), optimisation=how)
    whole = run(config, tmp_path / "whole")

    def killed(model, loss_of, *others, **named):
        def until_three(net, step):
            if step == 3:
                raise InterruptedError
            return loss_of(net, step)

        return optimise(model, until_three, *others, **named)

    with monkeypatch.context() as patch:
        patch.setattr("training.pretrain.optimise", killed)
        with pytest.raises(InterruptedError):
            run(config, tmp_path / "killed")
    resumed = run(config, tmp_path / "killed")
    for a, b in zip(whole.state_dict().values(), resumed.state_dict().values(), strict=True):
        assert torch.equal(a, b)


def test_two_sources_of_one_name_are_refused(folders):
    with pytest.raises(ValueError, match=r"names must differ, got .*'coarse', 'coarse'"):
        make_config(folders, sources=[Source(kind="classes", folder=folders / "coarse", share=1)] * 2)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"model": ViTConfig(stem="efficientnet")}, "efficientnet sees dropped patches by its convolutions"),
        ({"masked": None}, r"nuclei/images teaches only by \[masked\]"),
        ({"optimisation": Optimisation()}, "set optimisation.token_drop"),
        ({"model": MSHTConfig(tile_px=TILE_PX)}, "msht sees dropped patches"),
    ],
)
def test_guessing_what_is_not_hidden_is_refused(folders, changes, reason):
    with pytest.raises(ValueError, match=reason):
        make_config(folders, **{"sources": with_unlabelled(folders), "masked": Masked(), **changes})
