"""From numbers to documents: a sample and what the model said of it become what goes out."""

import math

import numpy as np
from numpy.typing import NDArray

from app import schemas
from app.maps import Drawable
from app.samples import Sample
from model.artifact import Manifest, Precision
from model.pixels import MIN_MPP
from model.scope import Doubt, judge
from model.session import Classifier

Floats = NDArray[np.float32]


class CoverageUnavailable(ValueError):
    pass


def describe_model(classifier: Classifier, precision: Precision) -> schemas.Model:
    manifest = classifier.manifest
    return schemas.Model(
        name=manifest.name,
        version=manifest.version,
        digest=classifier.digest,
        device=classifier.device,
        precision=precision,
    )


def describe_prediction(
    sample: Sample,
    probabilities: Floats,  # (V, K), a row a view
    manifest: Manifest,
    model: schemas.Model,
    coverage: float | None,
    distance: float | None,
) -> schemas.Prediction:
    mean = probabilities[0] if len(probabilities) == 1 else probabilities.mean(axis=0)
    top = int(mean.argmax())
    shares = dict(zip(manifest.class_names, mean.tolist(), strict=True))
    doubts, verdict = judge(sample.quality, distance, float(mean[top]), manifest.gate)
    if sample.tile.mpp_source == "unknown" and (doubt := doubt_scale(sample.picture.rgb, manifest)):
        doubts.append(doubt)
        verdict = "uncertain" if verdict == "ok" else verdict
    return schemas.Prediction(
        label=manifest.class_names[top],
        confidence=shares[manifest.class_names[top]],
        probabilities=shares,
        prediction_set=choose_set(mean, manifest, coverage),
        verdict=verdict,
        reasons=[schemas.Reason(code=doubt.code, text=doubt.text) for doubt in doubts],
        warnings=[
            schemas.Reason(code=note.code, text=note.text) for note in (*sample.picture.notes, *sample.tile.notes)
        ],
        quality=describe_quality(sample, distance),
        tta=compare_views(probabilities, top) if len(probabilities) > 1 else None,
        input=describe_input(sample),
        model=model,
    )


def doubt_scale(rgb: NDArray[np.uint8], manifest: Manifest) -> Doubt | None:
    """Where nobody tells the scale, the square that was looked at counts as one tile: some are too large to be one."""
    side_px, tile_um = min(rgb.shape[:2]), manifest.tile_px * manifest.tile_mpp
    if tile_um / side_px >= MIN_MPP:
        return None
    return Doubt(
        "implausible_scale",
        f"Nothing tells the scale, and {side_px} px are too many for the {tile_um:.0f} um of a tile: it is a larger "
        "field. Give um per pixel (mpp).",
    )


def describe_input(sample: Sample) -> schemas.Input:
    height, width = sample.picture.rgb.shape[:2]
    return schemas.Input(
        width=width,
        height=height,
        format=sample.picture.format,
        mpp=sample.tile.picture_mpp,
        mpp_source=sample.tile.mpp_source,
        sha256=sample.sha256,
        box=sample.tile.box,
    )


def describe_quality(sample: Sample, distance: float | None) -> schemas.Quality:
    quality = sample.quality
    return schemas.Quality(
        tissue_share=quality.tissue_share,
        sharpness=quality.sharpness,
        brightness=quality.brightness,
        odd_share=quality.odd_share,
        blue_absorption=quality.blue_absorption,
        foreign_share=quality.foreign_share,
        distance=distance if distance is not None and math.isfinite(distance) else None,
    )


def choose_set(probabilities: Floats, manifest: Manifest, coverage: float | None) -> schemas.PredictionSet | None:
    """The classes that cannot be ruled out at the wanted coverage; the most likely one always stays."""
    chosen = find_thresholds(manifest, coverage)
    if chosen is None:
        return None
    coverage, thresholds = chosen
    inside = probabilities >= 1 - np.array(thresholds)  # (K,)
    inside[probabilities.argmax()] = True
    labels = [manifest.class_names[k] for k in (-probabilities).argsort() if inside[k]]
    return schemas.PredictionSet(labels=labels, coverage=coverage)


def find_thresholds(manifest: Manifest, coverage: float | None) -> tuple[float, list[float]] | None:
    """The wanted or the artefact's usual coverage, and its threshold for every class; None where it has none."""
    conformal = manifest.conformal
    if conformal is None:
        if coverage is None:
            return None
        raise CoverageUnavailable(
            f"{manifest.name} {manifest.version} has no thresholds for prediction sets; leave out `coverage`"
        )
    wanted = conformal.default if coverage is None else coverage
    for known, thresholds in zip(conformal.coverages, conformal.thresholds, strict=True):
        if abs(known - wanted) < 1e-9:
            return known, thresholds
    known_ones = ", ".join(f"{known:g}" for known in conformal.coverages)
    most = conformal.n / (conformal.n + 1)
    raise CoverageUnavailable(
        f"coverage {wanted:g} is not available, only {known_ones}; "
        f"the {conformal.n} tiles that the thresholds were fitted on allow at most {most:.3f}"
    )


def compare_views(probabilities: Floats, top: int) -> schemas.Views:
    return schemas.Views(
        views=len(probabilities),
        disagreement=float((probabilities.argmax(axis=1) != top).mean()),
        spread=float(probabilities.std(axis=0).max()),
    )


def describe_attention(
    drawable: Drawable, sample: Sample, prediction: schemas.Prediction
) -> schemas.Attention | schemas.HeadsAttention:
    shape = schemas.Attention if drawable.grid.ndim == 2 else schemas.HeadsAttention
    return shape(
        method=drawable.method,
        quantity=drawable.quantity,
        class_specific=drawable.class_specific,
        signed=drawable.signed,
        target=drawable.target,
        layer=drawable.layer,
        head=drawable.head,
        logit_share=drawable.logit_share,
        limits=schemas.Limits(min=float(drawable.grid.min()), max=float(drawable.grid.max())),
        box=sample.tile.box,
        grid=drawable.grid.tolist(),
        prediction=prediction,
    )


def write_caption(drawable: Drawable, prediction: schemas.Prediction) -> str:
    model = prediction.model
    parts: list[str] = [drawable.method]
    if drawable.layer is not None:
        parts.append(f"layer {drawable.layer}")
    if drawable.head is not None:
        parts.append("mean of heads" if drawable.head == "mean" else f"head {drawable.head}")
    parts.append(f"for {drawable.target}" if drawable.target else "not specific to a class")
    if drawable.logit_share < 1:
        parts.append(f"of {drawable.logit_share:.0%} of the score")
    return f"{prediction.label} {prediction.confidence:.0%} · {', '.join(parts)} · {model.name} {model.version}"
