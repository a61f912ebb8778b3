import dataclasses

import numpy as np
import pytest

from training.config import BadConfig, Compare, Fit, read_config
from training.contest import Ledger, choose_finalists, enter, run_folds
from training.fit import read_tiles
from training.folds import make_folds
from training.run import IGNORED_BY_FOLDS, claim


@pytest.fixture
def entrants(contest_config, tmp_path):
    return enter(contest_config, tmp_path / "runs")


@pytest.fixture
def tiles(entrants):
    return read_tiles(entrants[0].config)


@pytest.fixture
def fold(entrants, tiles):
    return make_folds(tiles, entrants[0].config, "random", 1)[0]


@pytest.fixture
def ledger(entrants, tiles, tmp_path):
    return Ledger.read(tmp_path / "page.jsonl", entrants, tiles)


def test_networks_share_all_settings_but_their_own(contest_config, entrants):
    shared = read_config(contest_config.like, [], Fit)
    vit, resnet, _ = (entrant.config for entrant in entrants)
    assert vit.data == resnet.data == shared.data and vit.augment == resnet.augment == shared.augment
    assert vit.optimisation == shared.optimisation and vit.folds == 2
    assert (resnet.optimisation.steps, resnet.optimisation.token_drop, resnet.optimisation.batch) == (1, 0, 8)


def test_what_was_answered_is_read_back(ledger, entrants, tiles, fold, tmp_path):
    logits = np.random.default_rng(0).normal(size=(3, 3)).astype(np.float32)
    ledger.add(entrants[0], fold, logits)
    ledger.add(entrants[1], fold, -logits)
    again = Ledger.read(tmp_path / "page.jsonl", entrants, tiles).answers
    vit, resnet = (ledger.place(entrant, fold) for entrant in entrants[:2])
    assert again.keys() == ledger.answers.keys() == {vit, resnet}
    np.testing.assert_array_equal(again[resnet], ledger.answers[resnet])
    np.testing.assert_allclose(again[vit], logits, atol=5e-4)
    assert Ledger.read(tmp_path / "page.jsonl", entrants[2:], tiles).answers == {}


@pytest.mark.parametrize("lost", [1, 2, 40])  # the newline alone, one more character, most of the line
def test_a_last_line_that_was_cut_is_answered_anew_on_a_line_of_its_own(ledger, entrants, tiles, tmp_path, lost):
    path, logits = tmp_path / "page.jsonl", np.zeros((3, 3), np.float32)
    one, other = make_folds(tiles, entrants[0].config, "random", 1)
    ledger.add(entrants[0], one, logits)
    ledger.add(entrants[0], other, logits)
    path.write_bytes(path.read_bytes()[:-lost])
    again = Ledger.read(path, entrants, tiles)
    assert len(again.answers) == (2 if lost == 1 else 1)
    again.add(entrants[1], one, logits)
    answered = {ledger.place(entrants[0], one), ledger.place(entrants[1], one)}
    assert Ledger.read(path, entrants, tiles).answers.keys() - {ledger.place(entrants[0], other)} == answered


def test_a_damaged_line_amid_others_is_named(ledger, entrants, tiles, fold, tmp_path):
    path = tmp_path / "page.jsonl"
    ledger.add(entrants[0], fold, np.zeros((3, 3), np.float32))
    path.write_text(f'{path.read_text()}{{"network": "small\n{path.read_text()}')
    with pytest.raises(BadConfig, match=r"line 2 of .*page\.jsonl is damaged .*, expected JSON: take it out"):
        Ledger.read(path, entrants, tiles)


def test_answers_of_a_fold_that_is_drawn_otherwise_now_are_not_taken_for_its_own(ledger, entrants, fold):
    ledger.add(entrants[0], fold, np.zeros((len(fold.fold.held_out), 3), np.float32))
    assert ledger.place(entrants[0], fold) in ledger.answers
    redrawn = fold._replace(fold=fold.fold._replace(held_out=fold.fold.held_out[1:]))
    assert redrawn.folder == fold.folder and ledger.place(entrants[0], redrawn) not in ledger.answers


def test_answers_of_other_networks_or_tiles_are_not_mixed_in(ledger, entrants, tiles, fold, tmp_path):
    ledger.add(entrants[0], fold, np.zeros((3, 3), np.float32))
    longer = entrants[0].config.optimisation.model_copy(update={"steps": 3})
    changed = dataclasses.replace(entrants[0], config=entrants[0].config.model_copy(update={"optimisation": longer}))
    with pytest.raises(BadConfig, match=r"page.jsonl holds answers of small ViT with other settings; give it"):
        Ledger.read(tmp_path / "page.jsonl", [changed], tiles)
    with pytest.raises(BadConfig, match="small ViT with other tiles"):
        Ledger.read(tmp_path / "page.jsonl", entrants, tiles.subset(np.arange(10)))


def test_answers_stay_when_the_weights_they_began_from_are_gone_and_not_when_they_are_others(
    entrants, tiles, fold, tmp_path
):
    weights, path = tmp_path / "later.pt", tmp_path / "page.jsonl"
    weights.write_bytes(b"these")
    ledger = Ledger.read(path, entrants, tiles)
    ledger.add(entrants[2], fold, np.zeros((3, 3), np.float32))
    weights.unlink()
    assert ledger.place(entrants[2], fold) in Ledger.read(path, entrants, tiles).answers
    weights.write_bytes(b"those")
    with pytest.raises(BadConfig, match="ViT from elsewhere with other weights"):
        Ledger.read(path, entrants, tiles)


def test_a_fold_that_was_begun_from_other_weights_is_not_continued(contest_config, entrants, ledger, tmp_path):
    (tmp_path / "later.pt").write_bytes(b"these")
    claim(entrants[2].folder / "folds", entrants[2].config, ledger.tiles, IGNORED_BY_FOLDS)
    (tmp_path / "later.pt").write_bytes(b"those")
    with pytest.raises(BadConfig, match=r"weights changed since .*folds was begun"):
        run_folds(contest_config, entrants[2:], ledger, print)


def test_a_fold_of_other_tiles_is_not_continued(contest_config, entrants, ledger, tiles):
    claim(entrants[0].folder / "folds", entrants[0].config, tiles.subset(np.arange(1, 30)), IGNORED_BY_FOLDS)
    with pytest.raises(BadConfig, match="tiles changed since"):
        run_folds(contest_config, entrants[:1], ledger, print)


def test_the_best_by_one_round_are_the_finalists(contest_config, entrants, ledger, tiles):
    assert choose_finalists(contest_config, entrants[:2], ledger) == []
    truth = np.eye(3, dtype=np.float32)[tiles.targets]
    for entrant, answers in zip(entrants[:2], (truth[:, ::-1], truth), strict=True):
        for one in make_folds(tiles, entrant.config, "random", 1):
            ledger.add(entrant, one, answers[one.fold.held_out])
    assert choose_finalists(contest_config, entrants[:2], ledger) == [entrants[1]]
    assert choose_finalists(contest_config, entrants, ledger) == []  # the third waits, and might be better
    found = ledger.collect(entrants[1], "random", 1)
    assert found is not None and (found.logits[0].argmax(1) == tiles.targets).all()
    assert ledger.collect(entrants[1], "random", 2) is None and ledger.collect(entrants[1], "slide", 1) is None


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('name = "ResNet"', 'name = "small ViT"', "names must differ"),
        ('against = "ResNet"', 'against = "Resnet"', "nothing is named Resnet"),
        ("token_drop = 0.0", "token_drop = 0.5", "resnet has no tokens to drop"),
        ("widths = [8, 8, 8, 8]", "width = 8", "unknown key 'width'; the nearest known one is 'widths'"),
        ('"resnet"', '"vgg"', "vgg"),
    ],
)
def test_what_cannot_be_compared_is_refused(contest_config, tmp_path, old, new, message):
    path = tmp_path / "compare.toml"
    path.write_text(path.read_text().replace(old, new))
    with pytest.raises((BadConfig, ValueError), match=message):
        enter(read_config(path, [], Compare), tmp_path / "runs")
