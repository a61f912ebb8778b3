"""The wire: the options that come in, and every JSON document that goes out, with examples for the API docs."""

from enum import IntEnum
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from model.artifact import Device, MapMethod, Precision, Verdict

Colormap = Literal["viridis", "cividis", "magma", "diverging"]
Upsample = Literal["nearest", "bicubic"]
Share = Annotated[float, Field(ge=0, le=1)]
Box = Annotated[
    tuple[int, int, int, int],
    Field(description="Left, top, right and bottom edge in the picture's pixels.", examples=[[0, 0, 150, 150]]),
]


class ScaleOptions(BaseModel):
    model_config = ConfigDict(extra="forbid")

    mpp: float | None = Field(
        None,
        description="Micrometres per pixel of the picture, 0.1 to 5. If given, or tagged in the file, the picture is "
        "rescaled and only its centre tile is judged; if not, the whole centre square is resized.",
        examples=[0.495],
        json_schema_extra={"minimum": 0.1, "maximum": 5},  # told here, but refused with a code of its own
    )


class PredictOptions(ScaleOptions):
    tta: bool = Field(
        False, description="Average over the eight rotations and reflections, and tell how far they agree."
    )
    coverage: float | None = Field(
        None,
        gt=0,
        lt=1,
        description="Wanted coverage of the prediction set; `GET /model` lists which there are.",
        examples=[0.9],
    )


class FeatureOptions(ScaleOptions):
    format: Literal["json", "npy"] | None = Field(None, description="Form of the answer; beats the Accept header.")


class Masks(IntEnum):
    COARSE = 25  # as occlusion.COARSE_GROUPS, whose import would bring numpy along; a test compares them
    FINE = 100


class AttentionOptions(PredictOptions):
    method: MapMethod | None = Field(
        None,
        description="`attention`: what one layer's class token looks at. `rollout`: the same through all layers. "
        "`evidence`: what each patch adds to the target's logit. `occlusion`: how far the logit falls without it. "
        "Unset: attention where a layer, one head or `layout=heads` is asked for, occlusion where `masks` is 100, else "
        "the one that the artefact recommends. A network without tokens has neither attention nor rollout: "
        "`maps.methods` of `GET /model` lists what there is.",
    )
    target: str | None = Field(
        None, description="Class that evidence and occlusion are about. Unset: the predicted one.", examples=["Tumor"]
    )
    layer: int | None = Field(None, ge=0, description="Layer of the attention, from 0. Unset: the last.")
    head: Annotated[int, Field(ge=0)] | Literal["mean"] = Field(
        "mean", description="Head of the attention, from 0, or the mean of all."
    )
    layout: Literal["single", "heads"] = Field("single", description="`heads`: every layer and head side by side.")
    masks: Masks = Field(Masks.COARSE, description="Groups of patches that occlusion takes away in turn.")
    format: Literal["json", "png", "npy"] | None = Field(
        None, description="Form of the answer; beats the Accept header."
    )
    colormap: Colormap = Field(
        "viridis", description="Colours of a PNG; signed maps are always drawn diverging from zero."
    )
    alpha: float = Field(0.5, ge=0, le=1, description="Share of the colour over the grey tile.")
    upsample: Upsample = Field("nearest", description="`nearest` shows the patches, `bicubic` smooths.")


class Reason(BaseModel):
    code: str = Field(description="Stable word for programs.", examples=["low_confidence"])
    text: str = Field(
        description="Sentence for people.", examples=["The most likely class has only 29%, at least 32% is usual."]
    )


class PredictionSet(BaseModel):
    labels: list[str] = Field(
        description="The classes that together hold the true one as often as `coverage` says.",
        examples=[["Tumor", "Complex"]],
    )
    coverage: Share = Field(
        description="Share of tiles like those of the calibration whose class is in the set.", examples=[0.9]
    )


class Quality(BaseModel):
    tissue_share: Share = Field(description="Share of the tile that is stained.", examples=[0.94])
    sharpness: float = Field(
        ge=0, description="Variance of the Laplacian in squared grey levels; low means blurred.", examples=[412.7]
    )
    brightness: float = Field(
        description="Mean level of the stained pixels, 0 to 255; 255 where there are none.", examples=[118.4]
    )
    odd_share: Share = Field(
        description="Share of the stained pixels that absorb red or blue more than green: ink, other stains.",
        examples=[0.002],
    )
    blue_absorption: float = Field(
        description="Absorption of blue by the stained pixels, as a multiple of that of green.", examples=[0.59]
    )
    foreign_share: Share | None = Field(
        None,
        description="Share of the tile whose colours the training's tiles don't have; null where the artefact "
        "can't tell.",
        examples=[0.004],
    )
    distance: float | None = Field(
        None,
        description="Distance of the features from those of the training, about 1 for its own tiles; null where the "
        "artefact can't tell.",
        examples=[1.31],
    )


class Views(BaseModel):
    views: int = Field(description="Rotations and reflections that were averaged.", examples=[8])
    disagreement: Share = Field(description="Share of the views whose own label is another one.", examples=[0.125])
    spread: Share = Field(
        description="Largest standard deviation of a class's probability over the views.", examples=[0.021]
    )


class Input(BaseModel):
    width: int = Field(description="Of the picture, in pixels.", examples=[150])
    height: int = Field(examples=[150])
    format: str = Field(description="What the bytes are, whatever the content type said.", examples=["PNG"])
    mpp: float | None = Field(description="Micrometres per pixel of the picture; null when unknown.", examples=[0.495])
    mpp_source: Literal["request", "tag", "unknown"] = Field(description="Where `mpp` came from.", examples=["request"])
    sha256: str = Field(
        description="Of the bytes that came.",
        examples=["9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08"],
    )
    box: Box


class Model(BaseModel):
    name: str = Field(examples=["default"])
    version: str = Field(examples=["0.7.0"])
    digest: str = Field(
        description="sha256 of the artefact's manifest, which lists the sha256 of all else.",
        examples=["e39b0f64d701ce10438f2df911617a8030a79901449017b2e5f01f3546bd18fd"],
    )
    device: Device = Field(examples=["cpu"])
    precision: Precision = Field(examples=["fp32"])


class Prediction(BaseModel):
    label: str = Field(description="The most likely class.", examples=["Tumor"])
    confidence: Share = Field(description="Its calibrated probability.", examples=[0.971])
    probabilities: dict[str, Share] = Field(
        description="Of every class, in the artefact's order.",
        examples=[
            {"Tumor": 0.971, "Stroma": 0.004, "Complex": 0.012, "Lympho": 0.007, "Debris": 0.002, "Mucosa": 0.004}
        ],
    )
    prediction_set: PredictionSet | None = Field(description="Null while the artefact has no thresholds for it.")
    verdict: Verdict = Field(
        description="`out_of_scope`: not for this model; `uncertain`: unusual; `ok`: neither, yet it can be wrong.",
        examples=["ok"],
    )
    reasons: list[Reason] = Field(description="Why the verdict is not `ok`.", examples=[[]])
    warnings: list[Reason] = Field(description="What else is worth knowing about the picture.", examples=[[]])
    quality: Quality
    tta: Views | None = Field(description="With `tta=true`: how far the eight views agree.")
    input: Input
    model: Model


class Problem(BaseModel):
    """RFC 9457. `code` is stable; `detail` says what came, what was expected and what to do."""

    type: str = Field(examples=["urn:tissue:problem:image_too_small"])
    title: str = Field(examples=["The image is too small"])
    status: int = Field(examples=[422])
    detail: str = Field(examples=["the image is 20 x 150 px, its shorter side must have at least 32 px"])
    code: str = Field(examples=["image_too_small"])
    request_id: str | None = Field(None, examples=["5f0c7d9c0f0e4c1d8d6f4f1f2b3a4c5d"])
    errors: list["ParameterError"] | None = Field(None, description="With `invalid_parameter`: one entry a parameter.")


class ParameterError(BaseModel):
    parameter: str = Field(examples=["mpp"])
    message: str = Field(examples=["Input should be less than or equal to 5"])


class AnsweredItem(Prediction):
    file: str | None = Field(description="Name of the file, as the request gave it.", examples=["tile_01.png"])


class FailedItem(BaseModel):
    file: str | None = Field(description="Name of the file, as the request gave it.", examples=["tile_02.png"])
    error: Problem


Grid = Annotated[
    list[list[float]],
    Field(description="G rows of G numbers, from the top left.", examples=[[[0.012, 0.008], [0.031, 0.009]]]),
]


class Limits(BaseModel):
    min: float = Field(examples=[0.008])
    max: float = Field(examples=[0.031])


class Map(BaseModel):
    method: MapMethod = Field(examples=["attention"])
    quantity: str = Field(description="What the numbers are.", examples=["share of attention"])
    class_specific: bool = Field(
        description="False: the map is the same whatever class is asked about.", examples=[False]
    )
    signed: bool = Field(description="True: positive speaks for the target, negative against it.", examples=[False])
    target: str | None = Field(description="The class the map is about; null where it is about none.", examples=[None])
    layer: int | None = Field(description="From 0; null where the method uses all.", examples=[3])
    head: int | Literal["mean"] | None = Field(description="From 0, or the mean of all.", examples=["mean"])
    logit_share: Share = Field(
        description="Share of the label's score that passes through what the map shows, at least; under 1 for "
        "attention and rollout where other heads read the patches, or their colours, before any attention.",
        examples=[0.2],
    )
    limits: Limits = Field(description="Smallest and largest number of the map, as they are.")
    box: Box
    grid: Grid


class HeadsMap(Map):
    grid: Annotated[  # type: ignore[assignment]  # the same field, two dimensions deeper
        list[list[list[list[float]]]],
        Field(description="Layers, heads, rows, columns.", examples=[[[[[0.012, 0.008], [0.031, 0.009]]]]]),
    ]


class Attention(Map):
    prediction: Prediction


class HeadsAttention(HeadsMap):
    prediction: Prediction


class Features(BaseModel):
    features: list[float] = Field(
        description="What the last layer read to tell the class.", examples=[[0.41, -1.02, 0.33]]
    )
    input: Input
    model: Model


class ModelClass(BaseModel):
    name: str = Field(examples=["Tumor"])
    description: str = Field(examples=["tumour epithelium"])
    color: str = Field(examples=["#c80000"])


class ServiceLimits(BaseModel):
    """For clients that choose what to send, and how long to wait."""

    version: str = Field(description="Of this service, not of the model.", examples=["0.1.0"])
    max_images: int = Field(description="Most images in one `/predict/batch`.", examples=[64])
    max_body_bytes: int = Field(description="Largest body of a request.", examples=[33554432])
    max_megapixels: float = Field(description="Largest picture.", examples=[50.0])
    max_queue: int = Field(description="Tiles that may wait; eight for an image with `tta`.", examples=[256])
    deadline_ms: int = Field(description="An answer comes within this, or 504 does.", examples=[10000])


class ModelCard(BaseModel):
    """The artefact's manifest, where it runs, and what the service takes. More fields: docs/artifact.md."""

    model_config = ConfigDict(extra="allow")

    name: str = Field(examples=["default"])
    version: str = Field(examples=["0.7.0"])
    summary: str = Field(examples=["Six tissues of colorectal H&E"])
    classes: list[ModelClass]
    tile_px: int = Field(description="Side of the square the model sees.", examples=[150])
    tile_mpp: float = Field(description="Micrometres per pixel it was trained at.", examples=[0.495])
    grid: int = Field(description="Patches along a side.", examples=[10])
    layers: int = Field(examples=[4])
    heads: int = Field(examples=[3])
    metrics: list[dict[str, Any]] = Field(description="Each with its protocol, n and 95 % interval.")
    intended_use: str = Field(examples=["Research and teaching"])
    limits: list[str] = Field(examples=[["Not for diagnosis"]])
    digest: str = Field(examples=["e39b0f64d701ce10438f2df911617a8030a79901449017b2e5f01f3546bd18fd"])
    device: Device = Field(examples=["cpu"])
    precision: Precision = Field(examples=["fp32"])
    service: ServiceLimits


class Health(BaseModel):
    status: Literal["alive"] = Field("alive", examples=["alive"])


class Readiness(BaseModel):
    status: Literal["ready"] = Field("ready", examples=["ready"])
    device: Device = Field(description="Where the model really runs.", examples=["cpu"])
    precision: Precision = Field(examples=["fp32"])
    digest: str = Field(examples=["e39b0f64d701ce10438f2df911617a8030a79901449017b2e5f01f3546bd18fd"])
