"""The model card: the manifest in words and tables, for people. Nothing in it is typed by hand.

tissue-train report model/default docs/model-card.md
"""

from itertools import groupby
from pathlib import Path

from model.artifact import MAP_METHODS, Gate, JudgedMaps, Manifest, MapScore, Metric
from training.findings import CHANCE_ERROR
from training.maps import QUESTIONS, beats_no_model


def write_card(manifest: Manifest, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(render_card(manifest))


def render_card(m: Manifest) -> str:
    sections = [
        f"# Model card: {m.name} {m.version}",
        "<!-- Written by `tissue-train report` from the artefact's manifest: change that, not this. -->",
        m.summary,
        f"**{m.intended_use}**",
        "## What it takes and gives\n\n" + render_input(m),
        "## Classes\n\n" + table(["class", "what it is"], [[c.name, c.description] for c in m.classes]),
        "## What it must not be used for\n\n" + "\n".join(f"- {limit}" for limit in m.limits),
        "## How good it is\n\n" + render_metrics(m.metrics),
        "## Calibration, sets and limits\n\n" + render_calibration(m),
        "## Maps\n\n" + render_maps(m),
        "## Variants\n\n" + render_variants(m),
        "## Data\n\n"
        + table(
            ["source", "used for", "n", "licence", "origin"],
            [[d.name, d.use, str(d.n), d.licence, d.origin] for d in m.data],
        ),
        f"## Licence of the weights\n\n{m.weights_licence}",
        "## Made with\n\n" + table(["", "version"], [[name, version] for name, version in m.versions.items()]),
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def render_input(m: Manifest) -> str:
    a = m.architecture
    sizes = ", ".join(f"{name} {size}" for name, size in a.sizes.items())
    return (
        f"Tiles of {m.tile_px} x {m.tile_px} px at {m.tile_mpp} um/px in, calibrated probabilities of {len(m.classes)} "
        f"classes out. Architecture `{a.kind}`, {a.parameters:,} parameters ({sizes})."
    )


def render_metrics(metrics: list[Metric]) -> str:
    if not metrics:
        return "Nothing was held out, so nothing is known."
    parts = [
        "In brackets the 95 % bootstrap interval; n counts the tiles, or the slides, that were resampled. Where folds "
        "or slides were held out, each answer comes from a network that didn't learn from them; the exported network "
        "learnt from all tiles."
    ]
    if any(metric.name == CHANCE_ERROR for metric in metrics):
        parts.append(
            f"The calibration error, `ece`, is above 0 by chance alone. `{CHANCE_ERROR}` is what chance makes of it "
            "where every probability is true, in brackets 95 % of the draws: within them no miscalibration shows."
        )
    for protocol, group in groupby(metrics, key=lambda metric: metric.protocol):
        rows = [[x.name, f"{x.value:.3f} [{x.low:.3f}, {x.high:.3f}]", str(x.n)] for x in group]
        parts.append(f"### {protocol}\n\n" + table(["", "value", "n"], rows))
    return "\n\n".join(parts)


def render_calibration(m: Manifest) -> str:
    lines = [
        f"- Temperature {m.calibration.temperature:.3f}, fitted on n = {m.calibration.n}: {m.calibration.protocol}."
    ]
    if m.calibration.temperature != 1:
        lines.append(
            "- NLL, Brier score and calibration error under that protocol are at the temperature fitted there."
        )
    if m.conformal:
        c = m.conformal
        lines.append(
            f"- Prediction sets for coverages {c.coverages[0]:g} to {c.coverages[-1]:g} (default {c.default:g}), "
            f"n = {c.n}: {c.protocol}."
        )
    lines.append(f"- An answer is `ok` within all these limits: {m.gate.protocol}.\n\n" + render_gate(m.gate))
    return "\n".join(lines)


def render_gate(g: Gate) -> str:
    """Beyond a limit of the picture an answer is out of scope, beyond one of quality or of the network uncertain."""
    limits = [
        ("share of the tile that is tissue", "at least", g.min_tissue_share, "out of scope"),
        ("stained pixels that absorb red or blue more than green", "at most", g.max_odd_share, "out of scope"),
        ("absorption of blue, of that of green", "at most", g.max_blue_absorption, "out of scope"),
        ("pixels of colours that the training doesn't have", "at most", g.max_foreign_share, "out of scope"),
        ("sharpness, in squared grey levels", "at least", g.min_sharpness, "uncertain"),
        ("mean level of the tissue, of 255", "at least", g.min_brightness, "uncertain"),
        ("mean level of the tissue, of 255", "at most", g.max_brightness, "uncertain"),
        ("distance of the features, a training tile's being about 1", "at most", g.max_distance, "uncertain"),
        ("confidence", "at least", g.min_confidence, "uncertain"),
    ]
    rows = [[name, f"{side} {limit:.3g}", verdict] for name, side, limit, verdict in limits if limit is not None]
    return table(["", "limit", "else"], rows)


def render_maps(m: Manifest) -> str:
    reads = {"class": "the class token", "mean": "the mean of the patches", "both": "the class token and the mean"}
    evidence = {
        "exact": "exact: with the class's bias the patches add up to the logit",
        "first-order": "of first order: it doesn't add up to the logit",
        "mixed": "exact for what the head reads from the patches, of first order for what it reads from the class "
        "token: it doesn't add up to the logit",
    }
    reading = (
        f"The head reads {reads[m.maps.reads]}. Attention and rollout don't depend on the class: they show where "
        f"information was routed, not why. Evidence is signed, per class, in logit units, and "
        f"{evidence[m.maps.evidence]}. The default is `{m.maps.default}`."
    )
    if "attention" not in m.maps.methods:
        reading = (
            f"The network has no tokens, so no attention and no rollout; it has {' and '.join(m.maps.methods)}. "
            f"Evidence is signed, per class, in logit units, and {evidence[m.maps.evidence]}. "
            f"The default is `{m.maps.default}`."
        )
    if m.maps.judged is None:
        return f"{reading} How much any of them can be trusted was not measured."
    return f"{reading}\n\n{render_judged(m.maps.judged)}"


def render_judged(judged: JudgedMaps) -> str:
    """The table of maps, what follows from it, and where a map carries nothing."""
    metrics = {
        "removal": "removal gap (no skill: 0)",
        "focus": "mosaic focus (no skill: 0.5)",
        "other_class": "same for the second class",
        "random_weights": "same with shuffled weights",
        "other_tile": "same for another tile",
        "glands": "overlap with glands",
    }
    metrics = {metric: words for metric, words in metrics.items() if metric in {s.metric for s in judged.scores}}
    maps = list(dict.fromkeys(score.map for score in judged.scores))
    score_of = {(score.map, str(score.metric)): score for score in judged.scores}
    rows = [[name, *(render_score(score_of.get((name, metric))) for metric in metrics)] for name in maps]
    return "\n\n".join([conclude(judged), table(["map", *metrics.values()], rows), f"Protocol: {judged.protocol}."])


def render_score(score: MapScore | None) -> str:
    return "" if score is None else f"{score.value:.3f} [{score.low:.3f}, {score.high:.3f}]"


def conclude(judged: JudgedMaps) -> str:
    best = ", ".join(f"`{name}`" for name in judged.beat_all)
    sentences = [
        f"Judged on removal and focus, better than all four maps that no model drew, the intervals apart: {best}."
        if best
        else "No method is better, the intervals apart, than all four maps that no model drew on both removal and "
        "focus: read every map as a hypothesis."
    ]
    for name in [method for method in MAP_METHODS if method in {score.map for score in judged.scores}]:
        better = [metric for metric, question in QUESTIONS.items() if beats_no_model(judged.scores, name, metric)]
        if not better:
            sentences.append(f"`{name}` does no better than a map drawn without a model.")
        elif len(better) < len(QUESTIONS) and name not in judged.beat_all:
            lacking = next(question for metric, question in QUESTIONS.items() if metric not in better)
            sentences.append(f"`{name}` says nothing about {lacking}.")
    return " ".join(sentences)


def render_variants(m: Manifest) -> str:
    rows = [
        [name, f"{v.same_label:.4f}", f"{v.mean_probability_change:.5f}", str(v.n)] for name, v in m.variants.items()
    ]
    if not rows:
        return "fp32 only."
    return "Against fp32:\n\n" + table(["precision", "same label", "mean change of a probability", "tiles"], rows)


def table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)
