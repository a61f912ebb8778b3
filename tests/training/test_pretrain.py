import shutil
from pathlib import Path

import pytest
import torch

from model.msht import MSHTConfig
from model.network import build
from model.vit import ViTConfig
from tests.training.conftest import HOW, MODEL, TILE_PX, make_pretraining
from training import checkpoint
from training.config import BadConfig, Masked, Optimisation, Pretrain, Source
from training.cuts import Cutter
from training.fields import read_source
from training.pretrain import Pretrained, open_sources, pretrain
from training.train import optimise


def run(config: Pretrain, folder: Path) -> Pretrained:
    return pretrain(config, open_sources(config), folder)


def test_how_smooth_labels_are_is_the_configs_choice(folders, tmp_path):
    first, second = (
        run(make_pretraining(folders, optimisation=smooth), tmp_path / str(n)).state_dict()["heads.coarse.weight"]
        for n, smooth in enumerate(HOW.model_copy(update={"label_smoothing": share}) for share in (0.0, 0.5))
    )
    assert not torch.equal(first, second)


def test_it_runs_and_leaves_a_trunk_that_fit_can_start_from(folders, tmp_path):
    torch.manual_seed(0)
    model = run(make_pretraining(folders), tmp_path)
    assert isinstance(model, Pretrained)
    weights = torch.load(tmp_path / "latest.pt", weights_only=True)["weights"]
    assert {"vit.head.weight", "vit.pos_embed", "heads.coarse.weight", "heads.nuclei.weight"} <= weights.keys()


def test_msht_learns_the_same_way_and_starts_from_all_it_learnt(folders, tmp_path):
    model = MSHTConfig(tile_px=TILE_PX, channels=(8, 8, 8, 16), width=24, heads=3, pool="both")
    run(make_pretraining(folders, model=model), tmp_path)
    missing, unused = checkpoint.start_from(build(model, classes=2), tmp_path / "latest.pt")
    assert missing == [] and all(name.startswith("heads.") for name in unused)


def test_the_dense_heads_learn_where_things_are(folders, tmp_path):
    how = Optimisation(steps=60, batch=12, learning_rate=3e-3, ema=0.9, validate_every=60, checkpoint_every=60)
    config = make_pretraining(folders, optimisation=how)
    model = run(config, tmp_path)
    masks = Cutter(read_source(config.sources[2]), config)
    cut = masks.cut_at(masks.collection.fields[0], left=30, top=0, side=60)
    with torch.no_grad():
        out = model.vit(torch.tensor(cut.tile)[None].permute(0, 3, 1, 2).float() / 255)
        share = model.heads["glands"](model.vit.norm(out.tokens[-1])[0, 1:])[:, 0].sigmoid().view(4, 4)
    assert share[:, :2].mean() > share[:, 2:].mean() + 0.5


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
    config = make_pretraining(folders)
    rule = config.rules[0].model_copy(update=changes)
    with pytest.raises(BadConfig, match=complaint):
        open_sources(config.model_copy(update={"rules": [rule]}))


@pytest.mark.parametrize("name", ["nuc.v1", "train"])
def test_a_folder_that_no_head_can_be_called_after_is_refused(folders, tmp_path, name):
    shutil.copytree(folders / "nuclei", tmp_path / name)
    source = Source(kind="points", folder=tmp_path / name, table="points.csv", mpp=0.5, share=1)
    with pytest.raises(BadConfig, match=f"gives its head the name '{name}', which torch can't use"):
        open_sources(make_pretraining(folders, sources=[source], rules=[]))


def with_unlabelled(folders: Path) -> list[Source]:
    unlabelled = Source(kind="images", folder=folders / "nuclei" / "images", mpp=0.5, share=1)
    return [*make_pretraining(folders).sources, unlabelled]


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
    run(make_pretraining(folders, sources=with_unlabelled(folders), masked=Masked()), tmp_path)
    missing, unused = checkpoint.start_from(build(MODEL, classes=2), tmp_path / "latest.pt")
    assert missing == []
    assert {name.split(".")[0] for name in unused} == {"heads", "guesser"}
    assert not any("images" in name for name in unused)  # no head where there is no label


def test_a_killed_run_that_guesses_ends_with_the_weights_of_one_that_was_not(folders, tmp_path, monkeypatch):
    how = Optimisation(steps=4, batch=6, token_drop=0.5, validate_every=2, checkpoint_every=2)
    config = make_pretraining(folders, sources=with_unlabelled(folders), masked=Masked(), optimisation=how)
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
        make_pretraining(folders, sources=[Source(kind="classes", folder=folders / "coarse", share=1)] * 2)


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
        make_pretraining(folders, **{"sources": with_unlabelled(folders), "masked": Masked(), **changes})
