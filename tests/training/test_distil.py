import numpy as np
import pytest
import torch

from model.convnets import ResNetConfig
from training import checkpoint
from training.config import Distil, Fit
from training.distil import distillation_loss
from training.fit import fit_tiles, predict, read_tiles, train_teacher
from training.folds import cross_validate

TEACHER = ResNetConfig(widths=(8, 8, 8, 8), blocks=(1, 1, 1, 1))
SOFT = Distil(teacher=TEACHER, temperature=2.0)
HARD = Distil(teacher=TEACHER, kind="hard")


def test_a_student_that_says_the_same_has_nothing_to_learn():
    logits = torch.randn(4, 3)
    assert distillation_loss(logits, logits + 7, SOFT) == pytest.approx(0, abs=1e-6)
    assert distillation_loss(logits, logits.flip(1), SOFT) > 0.01


def test_soft_gradients_hardly_depend_on_the_temperature_and_hard_ones_take_the_decision_alone():
    student, teacher = torch.zeros(1, 3, requires_grad=True), torch.tensor([[0.02, 0.0, -0.02]])
    (warm,) = torch.autograd.grad(distillation_loss(student, teacher, SOFT), student)
    (hot,) = torch.autograd.grad(distillation_loss(student, teacher, Distil(teacher=TEACHER, temperature=20)), student)
    torch.testing.assert_close(warm, hot, rtol=0.02, atol=1e-4)
    assert distillation_loss(student, teacher, HARD) == distillation_loss(student, 100 * teacher, HARD)


@pytest.fixture(scope="module")
def config(small_fit):
    how = small_fit.optimisation.model_copy(update={"steps": 2, "validate_every": 2, "checkpoint_every": 2})
    return small_fit.model_copy(update={"distil": SOFT, "optimisation": how, "repeats": 1, "folds": 2})


@pytest.fixture(scope="module")
def tiles(config: Fit):
    return read_tiles(config)


def test_a_teacher_is_trained_first_and_what_it_says_changes_the_student(config, tiles, tmp_path):
    taught = fit_tiles(config, tiles, tmp_path / "taught", None)
    names = checkpoint.read_weights(tmp_path / "taught" / "teacher" / "latest.pt").keys()
    assert "blocks.0.conv1.weight" in names and "ending.head.weight" in names
    alone = fit_tiles(config.model_copy(update={"distil": None}), tiles, tmp_path / "alone", None)
    assert not np.allclose(predict(taught, tiles.tiles), predict(alone, tiles.tiles), atol=1e-6)

    deaf = config.model_copy(update={"distil": SOFT.model_copy(update={"weight": 0.0})})
    same = fit_tiles(deaf, tiles, tmp_path / "deaf", None)
    np.testing.assert_array_equal(predict(same, tiles.tiles), predict(alone, tiles.tiles))


def test_a_teacher_learns_all_of_its_layers(config, tiles, tmp_path):
    how = config.optimisation.model_copy(update={"frozen": ["early_head"]})  # a layer of the student's
    student = config.model_copy(update={"optimisation": how, "init": tmp_path / "x.pt"})
    assert train_teacher(student, tiles, tmp_path, "") is not None


def test_in_folds_the_teacher_sees_what_the_student_sees_and_is_thrown_away(config, tiles, tmp_path, monkeypatch):
    seen = []

    def note(config, train, folder, title):
        seen.append(train.records)

    monkeypatch.setattr("training.fit.train_teacher", note)
    found = cross_validate(config, tiles, tmp_path, "random", lambda line: None)
    for number, records in enumerate(seen):
        held_out = {tiles.records[i].sha256 for i in np.flatnonzero(found.folds[0] == number)}
        assert len(records) == 30 - len(held_out) and not held_out & {record.sha256 for record in records}


def test_folds_leave_no_networks_behind(config, tiles, tmp_path):
    cross_validate(config, tiles, tmp_path, "random", lambda line: None)
    assert not list(tmp_path.rglob("latest.pt"))
