"""What a run is: a TOML file, changed by `key=value` on the command line, refused where a key is unknown.

A config is a reproducible claim: each file in `configs/` opens with its command, hardware, duration and result.
"""

import difflib
import tomllib
from collections.abc import Iterator
from dataclasses import is_dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args

from pydantic import AfterValidator, BaseModel, ConfigDict, Discriminator, Field, Tag, ValidationError, model_validator

from model.artifact import DataSource, TissueClass
from model.convnets import ConvMixerConfig, PoolFormerConfig, ResNetConfig
from model.msht import MSHTConfig
from model.network import TokenConfig
from model.vit import ViTConfig
from training.augment import Augmentation

TILE_MPP = 0.495  # um/px of the tiles of Kather et al. 2016, which show 74 um from side to side in 150 px

Share = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[float, Field(gt=0)]
Count = Annotated[int, Field(ge=1)]


class BadConfig(ValueError):
    pass


def stay_inside(name: str) -> str:
    path = Path(name)
    if not path.parts or path.is_absolute() or ".." in path.parts:
        raise ValueError(
            f"it is the run's folder among the runs, such as 'default', and {name!r} would lie outside of them"
        )
    return name


Name = Annotated[str, AfterValidator(stay_inside)]


def architecture_of(model: Any) -> str:
    """`[model]` without `architecture` is a Vision Transformer."""
    return str(model.get("architecture", "vit") if isinstance(model, dict) else model.architecture)


# A network by its `architecture`, with that one's sizes and no other's.
Tokens = Annotated[
    Annotated[ViTConfig, Tag("vit")] | Annotated[MSHTConfig, Tag("msht")],
    Discriminator(architecture_of),
]
Model = Annotated[
    Annotated[ViTConfig, Tag("vit")]
    | Annotated[MSHTConfig, Tag("msht")]
    | Annotated[PoolFormerConfig, Tag("poolformer")]
    | Annotated[ConvMixerConfig, Tag("convmixer")]
    | Annotated[ResNetConfig, Tag("resnet")],
    Discriminator(architecture_of),
]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Optimisation(Section):
    steps: Count = 2000
    batch: Count = 64
    learning_rate: Positive = 5e-4
    weight_decay: float = Field(0.05, ge=0)  # not on biases, norms, positions and the class token
    warmup: Share = 0.1  # share of the steps in which the learning rate climbs; a cosine takes it down again
    clip: Positive = 1.0  # norm of the gradient
    ema: Share = 0.998  # the weights that are kept are a running average; short runs want a smaller number
    token_drop: Share = 0.0  # share of the patches not looked at in training
    label_smoothing: Share = 0.1
    precision: Literal["fp32", "bf16"] = "fp32"  # bf16 on a GPU, or on a CPU that has it in hardware
    frozen: list[str] = []  # beginnings of the names of layers that stay as they were at the start
    seed: int = 0
    validate_every: Count = 100  # steps
    checkpoint_every: Count = 100  # steps


class Labelled(Section):
    """A folder per class, and how much of it is looked at."""

    folder: Path
    generate: Count | None = None  # draws so many tiles per class into `folder` first, where it is not there
    table: Path | None = None  # CSV with columns file, label, slide, quality; else all is read from the names
    near_duplicates: Path | None = None  # CSV with columns a, b: kept together; without one they are searched for
    classes: list[str] | None = None  # in the artefact's order, others left out; default: the folders', sorted
    tile_mpp: Positive = TILE_MPP
    image_mpp: Positive | None = None  # default: that of each file's own tag; without one the whole image is the tile
    doubtful: list[str] = []  # qualities in the table; figures are given with and without such tiles

    @model_validator(mode="after")
    def state_the_scale(self) -> "Labelled":
        if not self.generate and not self.model_fields_set & {"image_mpp", "tile_mpp"}:
            raise ValueError(
                "the scale of the images is not stated: set image_mpp, their um/px, and the middle of each becomes a "
                f"tile of {self.tile_mpp} um/px; or, where each image is one tile, set tile_mpp: the um from side to "
                "side of an image, divided by model.tile_px (150)"
            )
        return self


class Card(Section):
    """What the manifest says that no measurement can."""

    version: str = "0.1.0"
    summary: str = ""
    classes: list[TissueClass] = []  # default: the folders' names and a palette
    data: list[DataSource] = []
    intended_use: str = "Research use only. Not a medical device."
    limits: list[str] = []
    weights_licence: str = "not stated"
    licence_file: Path | None = None
    check_tiles: Path | None = None  # a folder of tiles, labelled or not, on which the variants are compared
    int8: bool = True
    fp16: bool = False


class Distil(Section):
    """A network that is trained first, on the same tiles, and then shows another one what it sees in them."""

    teacher: Model
    kind: Literal["soft", "hard"] = "soft"  # its probabilities (Hinton, 1503.02531), or its decision (DeiT, 2012.12877)
    temperature: Positive = 3.0  # of soft probabilities
    weight: Share = 0.5  # of what it says; the rest is the labels'


class Rehearse(Section):
    """Cuts of the pretraining's fields, labelled by its rules, among the tiles: what other stains look like is kept."""

    pretraining: Path  # a config of `pretrain` with rules
    share: float = Field(0.33, gt=0, lt=1)  # of every batch
    per_class: Count = 300  # at most so many different cuts of each source


class Fit(Section):
    """`tissue-train fit` and `tissue-train cv`."""

    name: Name
    data: Labelled
    # course: so many of each class; fifth: at random; looks: whole groups of like stain and look; all: nothing held out
    split: Literal["course", "fifth", "looks", "all"] = "fifth"
    course: tuple[Count, Count, Count] = (425, 100, 100)  # of each class: training, validation, test
    init: Path | None = None  # a checkpoint of this project, a timm-named .safetensors, or EfficientNet-Lite0's .pth
    rehearse: Rehearse | None = None
    distil: Distil | None = None
    model: Model = ViTConfig()
    augment: Augmentation = Augmentation()
    optimisation: Optimisation = Optimisation()
    card: Card = Card()
    repeats: Count = 3  # of the cross-validation
    folds: int = Field(5, ge=2)
    groupings: list[Literal["random", "slide"]] = Field(["random", "slide"], min_length=1)  # of the cross-validation

    @model_validator(mode="after")
    def drop_only_tokens_that_are_there(self) -> "Fit":
        if self.optimisation.token_drop and not isinstance(self.model, TokenConfig):
            raise ValueError(f"{self.model.architecture} has no tokens to drop: set optimisation.token_drop = 0")
        return self

    @model_validator(mode="after")
    def freeze_only_what_was_learnt(self) -> "Fit":
        refuse_frozen_chance(self.optimisation, self.init)
        return self


def refuse_frozen_chance(how: Optimisation, init: Path | None) -> None:
    if how.frozen and init is None:
        raise ValueError(
            "optimisation.frozen keeps layers as they came, but without init they come at random: "
            "set init to weights, or take frozen away"
        )


class Source(Section):
    """One folder of images for pretraining; `share` is its part of every batch.

    classes: a folder per class. points: a table image, x, y, kind of marked nuclei. masks: a table image, mask, grade
    of outlined glands. images: nothing is known of them. Images lie in `folder`, or where the table says, seen from it.
    """

    kind: Literal["classes", "points", "masks", "images"]
    folder: Path
    share: Positive
    mpp: Positive | None = None  # default: the whole image is the tile
    zoom: tuple[Positive, Positive] = (0.85, 1.2)  # the side of a cut, as a share of a tile's
    table: str | None = None  # file in `folder`
    held_out: Share = 0.1  # of the images (of the patients, where the table names them), to show what was learnt


class Rule(Section):
    """A weak label for a cut of a `points` or `masks` source, from what lies in it.

    Amounts are numbers of nuclei by kind, or the share of the cut that is gland, by grade.
    """

    label: str
    kind: Literal["points", "masks"]
    at_least: dict[str, float]
    share: dict[str, float] = {}  # of the sum of all amounts
    absent: list[str] = []


class Masked(Section):
    """What lies in the dropped patches of all images is guessed from the kept ones."""

    weight: Positive = 1.0  # beside the losses of the labels
    width: int = Field(96, gt=0, multiple_of=32)  # of the decoder, a single block that is thrown away afterwards


class Pretrain(Section):
    """`tissue-train pretrain`."""

    name: Name
    tile_mpp: Positive = TILE_MPP
    sources: Annotated[list[Source], Field(min_length=1)]
    classes: list[str] = []  # of the weak labels; a `fit` on the same classes that starts from this keeps their head
    rules: list[Rule] = []
    masked: Masked | None = None
    init: Path | None = None  # as of `fit`
    model: Tokens = ViTConfig()
    augment: Augmentation = Augmentation()
    optimisation: Optimisation = Optimisation()

    @model_validator(mode="after")
    def tell_heads_apart(self) -> "Pretrain":
        names = [source.folder.name for source in self.sources if source.kind != "images"]
        if len(set(names)) != len(names):
            raise ValueError(f"heads are called after their source's folder, whose names must differ, got {names}")
        return self

    @model_validator(mode="after")
    def guess_only_what_is_hidden(self) -> "Pretrain":
        if self.masked is None:
            unlabelled = [str(source.folder) for source in self.sources if source.kind == "images"]
            if unlabelled:
                raise ValueError(f"without labels, {unlabelled[0]} teaches only by [masked]: add that section")
            return self
        if not isinstance(self.model, ViTConfig) or self.model.stem == "efficientnet":
            who = getattr(self.model, "stem", self.model.architecture)
            raise ValueError(f"{who} sees dropped patches by its convolutions: take [masked] away, or another stem")
        if not self.optimisation.token_drop:
            raise ValueError("[masked] guesses dropped patches, and none is: set optimisation.token_drop, such as 0.5")
        return self

    @model_validator(mode="after")
    def freeze_only_what_was_learnt(self) -> "Pretrain":
        refuse_frozen_chance(self.optimisation, self.init)
        return self

    @model_validator(mode="after")
    def move_and_blend_nothing(self) -> "Pretrain":
        if unused := self.augment.model_fields_set & {"crop", "flips", "mixup", "cutmix"}:
            raise ValueError(
                f"pretraining cuts and turns by itself and blends nothing: take {sorted(unused)} out of [augment]; "
                "how near a cut is, zoom of its source says"
            )
        return self


class Contestant(Section):
    """One network of a comparison."""

    name: str
    model: Model
    init: Path | None = None  # left out of the comparison until it is there
    distil: Distil | None = None
    optimisation: dict[str, Any] = {}  # what is other than in the shared settings
    against: str | None = None  # whose answers its own are paired with; default: the first network's


class Compare(Section):
    """`tissue-train compare`."""

    name: Name
    like: Path  # a config of `fit`, whose data, augmentation and optimisation all networks share
    networks: Annotated[list[Contestant], Field(min_length=2)]
    folds: int = Field(5, ge=2)
    rounds: Count = 3  # of folds for the finalists, one for the others
    finalists: Count = 2

    @model_validator(mode="after")
    def tell_networks_apart(self) -> "Compare":
        names = [network.name for network in self.networks]
        if len(set(names)) != len(names):
            raise ValueError(f"the networks' names must differ, got {names}")
        unknown = [n.against for n in self.networks if n.against and n.against not in names]
        if unknown:
            raise ValueError(f"nothing is named {unknown[0]}; the networks are {names}")
        return self


C = TypeVar("C", Fit, Pretrain, Compare)


def read_config(path: Path, overrides: list[str], kind: type[C]) -> C:
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8-sig"))  # with or without the mark that editors write
    except OSError as error:
        raise BadConfig(f"{path} can't be read: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise BadConfig(f"{path} is not valid TOML: {error}") from error
    for override in overrides:
        apply(override, content)
    refuse_unknown(content, kind, str(path))
    try:
        return kind.model_validate(content)
    except ValidationError as error:
        complaints = [
            ": ".join(filter(None, (".".join(map(str, e["loc"])), e["msg"].removeprefix("Value error, "))))
            for e in error.errors()
        ]
        raise BadConfig(f"{path}: {'; '.join(complaints)}") from error


def apply(override: str, content: dict[str, Any]) -> None:
    """`optimisation.steps=10` reads as TOML would: numbers, lists; else a string. `init=` takes the key away."""
    key, equals, text = override.partition("=")
    if not equals:
        raise BadConfig(f"'{override}' is no key=value, such as optimisation.steps=500")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text
    *sections, last = key.split(".")
    for section in sections:
        content = content.setdefault(section, {})
        if not isinstance(content, dict):
            raise BadConfig(f"'{override}': '{section}' is no section; expected one, as in optimisation.steps=500")
    if text:
        content[last] = value
    else:
        content.pop(last, None)


def refuse_unknown(content: dict[str, Any], kind: type, where: str) -> None:
    fields = kind.__annotations__ if is_dataclass(kind) else kind.model_fields  # type: ignore[attr-defined]
    for key, value in content.items():
        if key not in fields:
            nearest = difflib.get_close_matches(key, fields, n=1, cutoff=0)[0]
            raise BadConfig(f"{where}: unknown key '{key}'; the nearest known one is '{nearest}'")
        sections = list(sections_in(fields[key] if is_dataclass(kind) else fields[key].annotation))
        for item in value if isinstance(value, list) else [value]:
            if not isinstance(item, dict):
                continue
            for section in sections:
                if len(sections) == 1 or vars(section)["architecture"] == architecture_of(item):
                    refuse_unknown(item, section, f"{where} [{key}]")


def sections_in(annotation: Any) -> Iterator[type]:
    """Which sections a table of this annotation may be: one, or else networks, which `architecture` tells apart."""
    if not isinstance(annotation, type):
        for part in get_args(annotation):
            yield from sections_in(part)
    elif is_dataclass(annotation) or issubclass(annotation, BaseModel):
        yield annotation
