"""Pictures of what was measured, as PNG files: one function each, its title says the protocol and n.

Colours are told apart without red and green; nothing here touches matplotlib's global state.
"""

import csv
import itertools
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter
from numpy.typing import NDArray

from model.artifact import JudgedMaps, MapScore
from training.maps import NO_MODEL
from training.metrics import Estimate, Reliability, RiskCoverage, Scores
from training.patches import PatchMaps
from training.robustness import Row

BLUE, ORANGE, GREEN, PURPLE = "#0072b2", "#d55e00", "#009e73", "#cc79a7"  # Okabe and Ito's
PALE, INK, FAINT = "#a6cee3", "#333333", "#d9d9d9"
LINES = ((BLUE, "-"), (ORANGE, "--"), (GREEN, "-."), (PURPLE, ":"))  # told apart in grey, too
DPI = 150
SMALL, NORMAL, LARGE = 8, 9, 10.5  # pt

CURVES = {  # column of the training's table -> what a reader calls it
    "loss": "training loss",
    "accuracy": "validation accuracy",
    "learning_rate": "learning rate",
    "images_per_s": "images/s",
}
SEVERITY = {"misleading patch": "share of the tile's area"}  # of tests of several settings; else of the patches
MOST_SHOWN = 5  # fields of a source


def draw_curves(table: Path, path: Path, title: str) -> None:
    """`table` is the training's CSV, a row per validation."""
    with table.open(newline="") as file:
        rows = list(csv.DictReader(file))
    step = np.array([float(row["step"]) for row in rows])
    figure = start_figure(8, 5.2, f"{title}, {step.max(initial=0):,.0f} steps")
    for axes, (column, name) in zip(figure.subplots(2, 2, sharex=True).flat, CURVES.items(), strict=True):
        values = np.array([float(row[column]) for row in rows])
        axes.plot(step, values, color=BLUE, marker="." if len(step) < 40 else None, linewidth=1.3)
        axes.set_title(name, fontsize=NORMAL, color=INK, loc="left")
        # From zero, so that a jitter of the speed looks as small as it is.
        axes.set(xlim=(0, None), ylim=(0, 1 if column == "accuracy" else 1.1 * values.max(initial=0) or 1))
        axes.yaxis.set_major_locator(MaxNLocator(5))
        axes.ticklabel_format(axis="y", scilimits=(-2, 5), useMathText=True)
        axes.yaxis.get_offset_text().set_fontsize(SMALL)
        if not np.isfinite(values).any():
            axes.text(0.5, 0.5, "not measured", transform=axes.transAxes, ha="center", color=INK, fontsize=NORMAL)
            axes.set_yticks([])
        soften(axes)
    for axes in figure.axes[2:]:
        axes.set_xlabel("step", fontsize=NORMAL)
    save(figure, path)


def draw_confusion(scores: Scores, path: Path, protocol: str) -> None:
    """Counts, and under them the share of the true class; the shade is the share."""
    counts = scores.confusion.counts
    k = len(scores.classes)
    of_class = counts.sum(axis=1, keepdims=True)
    share = np.divide(counts, of_class, out=np.zeros(counts.shape), where=of_class > 0)
    side = 2.2 + 0.75 * k
    figure = start_figure(max(side, 5.5), side, f"Confusion, {protocol}, {count_words(scores)}")
    axes = figure.subplots()
    axes.imshow(share, cmap="Blues", vmin=0, vmax=1)
    for row, column in np.ndindex(counts.shape):
        colour = "white" if share[row, column] > 0.55 else INK
        text = f"{counts[row, column]:,}\n{share[row, column]:.0%}" if counts[row, column] else "·"
        axes.text(column, row, text, ha="center", va="center", color=colour, fontsize=NORMAL)
    axes.set_xticks(range(k), scores.classes, rotation=30, ha="right", rotation_mode="anchor", fontsize=NORMAL)
    axes.set_yticks(range(k), [f"{name} ({n:,})" for name, n in zip(scores.classes, of_class[:, 0], strict=True)])
    axes.tick_params(length=0, labelsize=NORMAL)
    axes.set_xlabel("predicted", fontsize=NORMAL)
    axes.set_ylabel("true (and how many)", fontsize=NORMAL)
    axes.spines[:].set_visible(False)
    save(figure, path)


def draw_reliability(bars: Reliability, ece: Estimate, path: Path, protocol: str) -> None:
    """Above, what came true of what was promised; below, how many answers each bin holds."""
    figure = start_figure(5, 5.8, f"Reliability, {protocol}, n = {ece.n:,}")
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(4, 1))
    upper.plot([0, 1], [0, 1], color=INK, linewidth=0.8, linestyle="--", label="promise kept")
    reach = [bars.accuracy - bars.low, bars.high - bars.accuracy]
    upper.errorbar(
        bars.confidence, bars.accuracy, reach, color=BLUE, marker="o", markersize=5, capsize=3, linewidth=1.3,
        label="accuracy of the bin, 95 %",
    )  # fmt: skip
    upper.set(ylim=(0, 1.02), xlim=(0, 1.02))
    upper.set_ylabel("accuracy", fontsize=NORMAL)
    upper.legend(loc="upper left", fontsize=SMALL, frameon=False)
    calibration = f"calibration error {ece.value:.3f}\n({ece.low:.3f} to {ece.high:.3f})"
    upper.text(0.98, 0.04, calibration, transform=upper.transAxes, ha="right", fontsize=NORMAL, color=INK)

    lower.bar(bars.confidence, bars.count, width=0.025, color=BLUE)
    lower.set_ylabel("answers", fontsize=NORMAL)
    lower.set_xlabel("confidence", fontsize=NORMAL)
    lower.yaxis.set_major_locator(MaxNLocator(3, integer=True))
    soften(upper, lower)
    save(figure, path)


def draw_risk_coverage(curve: RiskCoverage, path: Path, protocol: str) -> None:
    n = len(curve.coverage)
    figure = start_figure(5.8, 4.2, f"Error against share answered, {protocol}, {n:,} predictions")
    axes = figure.subplots()
    axes.plot(curve.coverage, curve.risk, color=BLUE, linewidth=1.5, label=f"confidence (area {curve.aurc:.3f})")
    axes.set(xlim=(0, 1), ylim=(0, None))
    axes.set_xlabel("share of the tiles answered, the surest first", fontsize=NORMAL)
    axes.set_ylabel("error among them", fontsize=NORMAL)
    axes.xaxis.set_major_formatter(PercentFormatter(1))
    axes.yaxis.set_major_formatter(PercentFormatter(1))
    axes.legend(loc="best", fontsize=SMALL, frameon=False)
    soften(axes)
    save(figure, path)


def draw_comparison(models: Mapping[str, Estimate], path: Path, protocol: str) -> None:
    """A bar per model with its 95 % interval, in the order given, the first on top."""
    n = sorted({estimate.n for estimate in models.values()})
    together = f"n = {n[0]:,}" if len(n) == 1 else f"n = {n[0]:,} to {n[-1]:,}"
    figure = start_figure(7, 1.3 + 0.42 * len(models), f"Accuracy, {protocol}, {together}")
    axes = figure.subplots()
    for place, estimate in enumerate(models.values()):
        axes.barh(place, estimate.value, height=0.6, color=PALE)
        axes.errorbar(estimate.value, place, xerr=whiskers([estimate]), color=INK, capsize=3, linewidth=1.2, marker="|")
        axes.text(estimate.high + 0.015, place, f"{estimate.value:.3f}", va="center", fontsize=NORMAL, color=INK)
    axes.set_yticks(range(len(models)), list(models), fontsize=NORMAL)
    axes.invert_yaxis()
    axes.set_xlim(0, max(1.0, *(estimate.high for estimate in models.values())) * 1.1)
    axes.set_xlabel("accuracy, with its 95 % interval", fontsize=NORMAL)
    soften(axes)
    axes.tick_params(axis="y", length=0)
    axes.grid(False, axis="y")
    save(figure, path)


def draw_protocols(rows: Mapping[str, Mapping[str, Estimate]], path: Path) -> None:
    """A row per model, the first on top, with a mark and its 95 % interval for each protocol that is known of it."""
    protocols = list(dict.fromkeys(protocol for found in rows.values() for protocol in found))
    n = {protocol: max(found[protocol].n for found in rows.values() if protocol in found) for protocol in protocols}
    figure = start_figure(8, 1.4 + 0.42 * len(rows), "Accuracy, with its 95 % interval")
    axes = figure.subplots()
    for number, protocol in enumerate(protocols):
        known = {place: found[protocol] for place, found in enumerate(rows.values()) if protocol in found}
        places = [place + 0.24 * (number - (len(protocols) - 1) / 2) for place in known]
        estimates = list(known.values())
        axes.errorbar(
            [estimate.value for estimate in estimates], places, xerr=whiskers(estimates), color=LINES[number][0],
            marker="os^D"[number], markersize=5, linestyle="", capsize=3, linewidth=1.3,
            label=f"{protocol}, n = {n[protocol]:,}",
        )  # fmt: skip
    axes.set_yticks(range(len(rows)), list(rows), fontsize=NORMAL)
    axes.invert_yaxis()
    axes.set_xlim(0, 1)
    axes.set_xlabel("accuracy", fontsize=NORMAL)
    axes.legend(loc="lower left", fontsize=SMALL, frameon=False)
    soften(axes)
    axes.tick_params(axis="y", length=0)
    axes.grid(False, axis="y")
    save(figure, path)


def draw_patch_maps(found: PatchMaps, path: Path) -> None:
    """Tiles, and of all that is looked for what is in each patch and what was seen there, on one scale a pair."""
    shown = np.linspace(0, len(found.tiles) - 1, min(MOST_SHOWN, len(found.tiles))).round().astype(int)
    columns = 1 + 2 * len(found.names)
    title = f"{found.title}, n = {len(found.tiles):,}; r: correlation over all patches"
    figure = start_figure(max(1.35 * columns, 5), 0.8 + 1.45 * len(shown), title)
    grid = figure.subplots(len(shown), columns, squeeze=False)
    for line, tile in zip(grid, shown, strict=True):
        line[0].imshow(found.tiles[tile])
        for channel in range(len(found.names)):
            most = max(found.truth[..., channel].max(), 1e-6)
            for place, maps in enumerate((found.truth, found.seen)):
                line[1 + 2 * channel + place].imshow(maps[tile, ..., channel], cmap="viridis", vmin=0, vmax=most)
    for axes in grid.flat:
        axes.set(xticks=[], yticks=[])
        axes.spines[:].set_visible(False)
    for channel, name in enumerate(found.names):
        grid[0, 1 + 2 * channel].set_title(f"{name}:\nthere", fontsize=SMALL, color=INK)
        seen = f"seen\n(r = {found.correlation(channel):.2f})"
        grid[0, 2 + 2 * channel].set_title(seen, fontsize=SMALL, color=INK)
    save(figure, path)


def draw_map_scores(judged: JudgedMaps, path: Path) -> None:
    """Removal and focus of each map with its 95 % interval; the line is the best that a map without a model reaches."""
    names = list(dict.fromkeys(score.map for score in judged.scores))
    figure = start_figure(8, 1.6 + 0.34 * len(names), "Maps judged beside four that no model drew")
    for axes, (metric, title, no_skill) in zip(
        figure.subplots(1, 2, sharey=True),
        (("removal", "removal gap", 0.0), ("focus", "mosaic focus", 0.5)),
        strict=True,
    ):
        found = {score.map: score for score in judged.scores if score.metric == metric}
        axes.axvline(no_skill, color=INK, linewidth=0.8)
        if limits := [found[name].high for name in NO_MODEL if name in found]:
            axes.axvline(max(limits), color=ORANGE, linewidth=1, linestyle="--")
        for place, name in enumerate(names):
            if name not in found:
                continue
            score, colour = found[name], INK if name in NO_MODEL else BLUE
            axes.errorbar(score.value, place, xerr=whiskers([score]), color=colour, marker="o", markersize=4, capsize=3)
        n = max((score.n for score in found.values()), default=0)
        axes.set_xlabel(f"{title} (no skill: {no_skill:g}), n = {n}", fontsize=NORMAL)
        soften(axes)
    figure.axes[0].set_yticks(range(len(names)), names, fontsize=NORMAL)
    figure.axes[0].invert_yaxis()
    save(figure, path)


def draw_removal(curves: Mapping[str, NDArray[np.floating[Any]]], path: Path) -> None:
    """Mean probability of the answered class while patches go: the map's most important first, and its least."""
    columns = 4
    rows = math.ceil(len(curves) / columns)
    figure = start_figure(8.5, 0.9 + 1.9 * rows, "Probability of the answer while patches are taken away")
    grid = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
    for axes, (name, (most, least)) in zip(grid.flat, curves.items(), strict=False):
        gone = np.linspace(0, 1, len(most))
        axes.plot(gone, least, color=BLUE, linewidth=1.4, label="least important first")
        axes.plot(gone, most, color=ORANGE, linewidth=1.4, linestyle="--", label="most important first")
        axes.fill_between(gone, most, least, color=PALE, alpha=0.4, linewidth=0)
        axes.set_title(name, fontsize=NORMAL, color=INK, loc="left")
        axes.set(xlim=(0, 1), ylim=(0, 1))
        axes.xaxis.set_major_formatter(PercentFormatter(1))
        soften(axes)
    for axes in grid.flat[len(curves) :]:
        axes.set_visible(False)
    grid.flat[0].legend(fontsize=SMALL - 1, frameon=False, loc="lower left")
    figure.supxlabel("patches taken away", fontsize=NORMAL)
    save(figure, path)


def draw_robustness(rows: Sequence[Row], folder: Path, protocol: str) -> None:
    """A picture per test, and in it a panel per way of doing the damage."""
    pictures = {
        "patch-drop": [test for test in unique(rows) if test.startswith("patch drop")],
        "shuffle": ["shuffle"],
        "misleading-patch": ["misleading patch"],
        "worse-pictures": ["stain", "blur", "JPEG", "low resolution"],
    }
    for name, tests in pictures.items():
        drawn = [test for test in tests if test in unique(rows)]
        if drawn:
            draw_damage(rows, drawn, folder / f"{name}.png", protocol)


def unique(rows: Sequence[Row]) -> list[str]:
    return list(dict.fromkeys(row.test for row in rows))


def draw_damage(rows: Sequence[Row], tests: Sequence[str], path: Path, protocol: str) -> None:
    """Colour and dashes tell settings apart, markers artefacts; at severity 0 stand the intact tiles."""
    artifacts = list(dict.fromkeys(row.artifact for row in rows))
    figure = start_figure(max(7.5, 3.1 * len(tests)), 4.6, protocol)
    panels = figure.subplots(1, len(tests), sharey=True, squeeze=False)[0]
    for axes, test in zip(panels, tests, strict=True):
        settings = list(dict.fromkeys(row.setting for row in rows if row.test == test))
        for (i, setting), (j, artifact) in itertools.product(enumerate(settings), enumerate(artifacts)):
            own = [row for row in rows if (row.artifact, row.test, row.setting) == (artifact, test, setting)]
            colour, style = (*LINES, (INK, "-"))[(i if len(settings) > 1 else j) % 5]
            axes.errorbar(
                [row.severity for row in own], [row.value for row in own], whiskers(own), color=colour, linestyle=style,
                marker="os^Dv"[j % 5], markersize=4, linewidth=1.3, elinewidth=0.6, capsize=2,
                label=", ".join([setting] * (len(settings) > 1) + [artifact] * (len(artifacts) > 1)),
            )  # fmt: skip
        for row in rows:
            if row.test == "intact":
                axes.axhline(row.value, color=INK, linewidth=0.7, linestyle=":")
        axes.set_title(test, fontsize=NORMAL, color=INK, loc="left")
        axes.set_xlabel(
            SEVERITY.get(test, settings[0] if len(settings) == 1 else "share of the patches"), fontsize=NORMAL
        )
        axes.set_ylim(0, 1.02)
        if test == "JPEG":
            axes.invert_xaxis()
        axes.yaxis.set_major_formatter(PercentFormatter(1))
        soften(axes)
    handles, labels = panels[0].get_legend_handles_labels()
    if any(labels):
        figure.legend(handles, labels, fontsize=SMALL, frameon=False, loc="outside lower center", ncols=3)
    panels[0].set_ylabel("right, with its 95 % interval (dotted: intact)", fontsize=NORMAL)
    save(figure, path)


# -- what all share ------------------------------------------------------------------------------------------------


def start_figure(width_inch: float, height_inch: float, title: str) -> Figure:
    figure = Figure(figsize=(width_inch, height_inch), dpi=DPI, layout="constrained", facecolor="white")
    figure.suptitle(title, fontsize=LARGE, color=INK, x=0.02, ha="left", wrap=True)
    return figure


def whiskers(bars: Sequence[Estimate | MapScore | Row]) -> list[list[float]]:
    """How far their intervals reach, below and above."""
    return [[bar.value - bar.low for bar in bars], [bar.high - bar.value for bar in bars]]


def soften(*every: Axes) -> None:
    for axes in every:
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(True, color=FAINT, linewidth=0.6)
        axes.set_axisbelow(True)
        axes.tick_params(labelsize=SMALL, color=INK, labelcolor=INK)


def count_words(scores: Scores) -> str:
    repeated = f" ({scores.predictions:,} predictions)" if scores.predictions != scores.n else ""
    return f"n = {scores.n:,}{repeated}"


def save(figure: Figure, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, format="png")
