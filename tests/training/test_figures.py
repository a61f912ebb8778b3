import csv
import math
import subprocess
import sys
from contextlib import contextmanager

import numpy as np
import pytest
from PIL import Image

from training import figures
from training.figures import (
    draw_comparison,
    draw_confusion,
    draw_curves,
    draw_protocols,
    draw_reliability,
    draw_risk_coverage,
)
from training.metrics import Estimate, reliability, risk_coverage, score

PROTOCOL = "3 x 5 random folds, all tiles"
CLASSES = ["Tumor", "Stroma", "Debris"]
RNG = np.random.default_rng(0)
TARGETS = np.tile(np.arange(30) % 3, 2)
PROBABILITIES = RNG.dirichlet(np.ones(3), 60) * 0.5 + 0.5 * np.eye(3)[TARGETS]
TILES = np.arange(30).repeat(2)


@pytest.fixture
def drawn(monkeypatch):
    """The figures as matplotlib knows them, besides being saved."""
    found = []

    def keep_and_save(figure, path, save=figures.save):
        save(figure, path)
        found.append(figure)

    monkeypatch.setattr(figures, "save", keep_and_save)
    return found


def words_of(figure):
    texts = [figure.get_suptitle()]
    for axes in figure.axes:
        texts += [t.get_text() for t in axes.texts] + [axes.get_xlabel(), axes.get_ylabel(), axes.get_title(loc="left")]
        texts += [t.get_text() for t in (*axes.get_xticklabels(), *axes.get_yticklabels())]
    return texts


@contextmanager
def all_within(drawn):
    """No word leaves the picture, and no two words of one axes lie on each other."""
    yield
    figure = drawn[-1]
    width, height = figure.canvas.get_width_height()
    for axes in figure.axes:
        boxes = [text.get_window_extent() for text in axes.texts if text.get_text()]
        for box in boxes:
            assert box.x0 >= -1 and box.y0 >= -1 and box.x1 <= width + 1 and box.y1 <= height + 1
        for i, box in enumerate(boxes):
            assert not any(box.overlaps(other) for other in boxes[i + 1 :])


def write_curve(path, rows):
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["step", "loss", "learning_rate", "images_per_s", "accuracy"])
        writer.writerows(rows)
    return path


def test_curves_show_the_table(tmp_path, drawn):
    rows = [(100 * i, math.exp(-i), 1e-4 * i, 100 + i, 1 - 0.5**i) for i in range(1, 6)]
    draw_curves(write_curve(tmp_path / "curve.csv", rows), tmp_path / "curves.png", "smoke")
    loss, accuracy, rate, speed = drawn[0].axes
    assert drawn[0].get_suptitle() == "smoke, 500 steps"
    assert loss.lines[0].get_xydata().tolist() == [[row[0], row[1]] for row in rows]
    assert accuracy.lines[0].get_ydata().tolist() == [row[4] for row in rows]
    assert rate.lines[0].get_ydata().tolist() == [row[2] for row in rows]
    assert speed.lines[0].get_ydata().tolist() == [row[3] for row in rows]
    assert speed.get_ylim()[0] == 0 and speed.get_ylim()[1] > 105


@pytest.mark.parametrize("rows", [[(100, 2.0, 1e-4, 120, "nan")], []])
def test_curves_without_validation_say_so(tmp_path, drawn, rows):
    draw_curves(write_curve(tmp_path / "curve.csv", rows), tmp_path / "curves.png", "smoke")
    assert "not measured" in words_of(drawn[0])


def test_confusion_shows_counts_and_the_share_of_the_true_class(tmp_path, drawn):
    targets = np.array([0] * 10 + [1] * 4)
    predicted = np.array([0] * 8 + [1] * 2 + [1] * 3 + [2])
    with all_within(drawn):
        draw_confusion(score(np.eye(3)[predicted], targets, CLASSES), tmp_path / "c.png", PROTOCOL)
    words = words_of(drawn[0])
    assert words[0] == f"Confusion, {PROTOCOL}, n = 14"
    assert {"8\n80%", "2\n20%", "3\n75%", "1\n25%"} <= set(words)
    assert "Debris (0)" in words
    cells = {text.get_text(): text.get_position() for text in drawn[0].axes[0].texts}
    assert cells["2\n20%"] == (1, 0)  # predicted across, true down


def test_repeated_predictions_are_counted_apart_from_tiles(tmp_path, drawn):
    draw_confusion(score(PROBABILITIES, TARGETS, CLASSES, TILES), tmp_path / "c.png", PROTOCOL)
    assert drawn[0].get_suptitle().endswith("n = 30 (60 predictions)")


def test_reliability_shows_bins_with_their_counts(tmp_path, drawn):
    found = reliability(PROBABILITIES, TARGETS, TILES)
    with all_within(drawn):
        ece = score(PROBABILITIES, TARGETS, CLASSES, TILES).ece
        draw_reliability(found, ece, tmp_path / "r.png", PROTOCOL)
    upper, lower = drawn[0].axes
    assert drawn[0].get_suptitle() == f"Reliability, {PROTOCOL}, n = 30"
    assert upper.lines[1].get_ydata() == pytest.approx(found.accuracy)
    assert [bar.get_height() for bar in lower.patches] == found.count.tolist()
    assert f"calibration error {ece.value:.3f}" in upper.texts[0].get_text()


def test_risk_coverage_names_its_area(tmp_path, drawn):
    right = PROBABILITIES.argmax(axis=1) == TARGETS
    curve = risk_coverage(PROBABILITIES.max(axis=1), right)
    draw_risk_coverage(curve, tmp_path / "r.png", PROTOCOL)
    (axes,) = drawn[0].axes
    assert "60 predictions" in drawn[0].get_suptitle()
    assert [line.get_label() for line in axes.lines] == [f"confidence (area {curve.aurc:.3f})"]


def test_comparison_shows_every_model_and_its_interval(tmp_path, drawn):
    models = {"plain ViT": Estimate(0.7, 0.6, 0.8, 179), "colour histogram, SVM": Estimate(1.0, 0.97, 1.0, 154)}
    with all_within(drawn):
        draw_comparison(models, tmp_path / "m.png", PROTOCOL)
    (axes,) = drawn[0].axes
    assert drawn[0].get_suptitle() == f"Accuracy, {PROTOCOL}, n = 154 to 179"
    assert [text.get_text() for text in axes.texts] == ["0.700", "1.000"]
    assert axes.get_yticklabels()[0].get_text() == "plain ViT"
    assert axes.get_ylim()[0] > axes.get_ylim()[1]  # the first on top
    ((start, end),) = axes.collections[0].get_segments()
    assert (start[0], end[0]) == pytest.approx((0.6, 0.8))


def test_protocols_stand_apart_in_the_row_of_their_model(tmp_path, drawn):
    both = {"random folds": Estimate(0.7, 0.6, 0.8, 179), "leave-slide-out": Estimate(0.5, 0.3, 0.6, 10)}
    rows = {"plain ViT": both, "MSHT, pretrained": {"random folds": Estimate(0.8, 0.7, 0.9, 179)}}
    with all_within(drawn):
        draw_protocols(rows, tmp_path / "p.png")
    (axes,) = drawn[0].axes
    folds, slides = axes.containers
    assert (folds.get_label(), slides.get_label()) == ("random folds, n = 179", "leave-slide-out, n = 10")
    assert folds[0].get_xdata().tolist() == [0.7, 0.8] and slides[0].get_xdata().tolist() == [0.5]
    assert folds[0].get_ydata()[0] < slides[0].get_ydata()[0] < 0.5 < folds[0].get_ydata()[1]
    assert [label.get_text() for label in axes.get_yticklabels()] == list(rows)


def test_pictures_are_png_files_in_folders_made_for_them(tmp_path):
    path = tmp_path / "new" / "folder" / "m.png"
    draw_comparison({"plain ViT": Estimate(0.7, 0.6, 0.8, 179)}, path, PROTOCOL)
    with Image.open(path) as picture:
        assert picture.format == "PNG"
        assert min(picture.size) > 200


def test_nothing_of_matplotlib_that_all_share_is_touched(tmp_path):
    code = f"""
import sys, pathlib, matplotlib
settings = [name for name in matplotlib.rcParams if name != "backend"]  # asked for it, matplotlib imports pyplot
before = [matplotlib.rcParams[name] for name in settings]
from training.figures import draw_comparison
from training.metrics import Estimate
draw_comparison({{"a": Estimate(0.7, 0.6, 0.8, 9)}}, pathlib.Path({str(tmp_path / "m.png")!r}), "held out")
assert "matplotlib.pyplot" not in sys.modules
assert [matplotlib.rcParams[name] for name in settings] == before
"""
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True)
