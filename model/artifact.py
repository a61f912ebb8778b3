"""The artefact: a directory of graphs and one manifest.json that says all that is known of them.

Training writes it, the service reads it. It either verifies to the last byte or is refused.
"""

import hashlib
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

FORMAT = 1
MANIFEST = "manifest.json"

Device = Literal["cpu", "cuda"]
Precision = Literal["fp32", "fp16", "int8"]
Verdict = Literal["ok", "uncertain", "out_of_scope"]
Role = Literal["predict", "explain", "weights", "golden", "licence", "reference"]
MapMethod = Literal["attention", "rollout", "evidence", "occlusion"]
MAP_METHODS: tuple[MapMethod, ...] = get_args(MapMethod)
Removal = Literal["token", "pixels", "pixels and token"]
Share = Annotated[float, Field(ge=0, le=1)]


CLASS_NAME = r"^[^:\x00-\x1f\x7f-\x9f]+$"  # printed on terminals; QuPath splits at colons
COLOR = r"^#[0-9a-f]{6}$"
NOTES = (".md", ".txt")  # that may lie beside an artefact


class CorruptArtifact(ValueError):
    """The directory is no artefact, or not the one its manifest describes."""


class Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class TissueClass(Part):
    name: str = Field(pattern=CLASS_NAME)
    description: str
    color: str = Field(pattern=COLOR)


class Architecture(Part):
    kind: str  # "vit", "msht", "poolformer", "convmixer", "resnet"
    sizes: dict[str, int | float | str | list[float]]
    parameters: int


class Calibration(Part):
    temperature: float = Field(gt=0)  # logits are divided by it inside the graph; 1 leaves them as they are
    n: int  # tiles, or slides, it was fitted on
    protocol: str


class Conformal(Part):
    """A class is in the set where its probability is at least 1 - threshold; the top class always is."""

    coverages: list[Share]  # ascending; what may be asked for
    thresholds: list[list[Share]]  # one list per coverage, one threshold per class
    default: Share
    n: int
    protocol: str


class Gate(Part):
    """Limits within which an answer is `ok`."""

    min_tissue_share: Share
    min_sharpness: float = Field(ge=0)
    min_confidence: Share
    # The limits below are None in older artefacts, and where nothing was measured to fit them on.
    min_brightness: float | None = None
    max_brightness: float | None = None
    max_odd_share: float | None = None
    max_blue_absorption: float | None = None
    max_foreign_share: float | None = None
    max_distance: float | None = None
    protocol: str


class Metric(Part):
    name: str
    value: float
    low: float  # 95 % interval
    high: float
    n: int
    protocol: str


class DataSource(Part):
    name: str
    use: str
    n: int
    licence: str
    origin: str


class File(Part):
    path: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")  # beside the manifest, nowhere else
    role: Role
    precision: Precision | None = None
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    bytes: int


class Variant(Part):
    """What a graph of another precision changes, measured against fp32."""

    same_label: Share
    mean_probability_change: Share
    n: int  # tiles, labelled or not


class Golden(Part):
    """A generated tile whose answer must be met on the very device and precision in use."""

    probabilities: list[Share]
    tolerance: dict[Precision, Annotated[float, Field(gt=0, le=0.1)]]  # of a probability


class MapScore(Part):
    """One number of one map, with its 95 % interval; docs/maps.md says what each measures."""

    map: str  # a method, or one of the maps that no model drew
    metric: Literal["removal", "focus", "other_class", "random_weights", "other_tile", "glands"]
    value: float
    low: float
    high: float
    n: int


class JudgedMaps(Part):
    protocol: str
    beat_all: list[MapMethod]  # the methods that beat every map without a model on removal and focus, the best first
    scores: list[MapScore]


class Maps(Part):
    evidence: Literal["exact", "first-order", "mixed"]  # exact: with the bias it adds up to the logit
    default: MapMethod
    reads: Literal["class", "mean", "both"]  # which tokens the head reads; mean where the network has cells instead
    methods: list[MapMethod] = list(MAP_METHODS)  # those that can be asked for
    removal: Removal = "token"  # what `keep` takes away: the patch's token, or its pixels (filled with the mean colour)
    judged: JudgedMaps | None = None  # by `tissue-train judge-maps --write`, which also chooses the default


class Manifest(Part):
    format: Literal[1]
    name: str = Field(pattern=r"^[^\x00-\x1f\x7f-\x9f]+$")
    version: str
    summary: str
    architecture: Architecture
    classes: list[TissueClass] = Field(min_length=2)
    tile_px: int = Field(gt=0, le=2048)  # beyond that one tile would fill the memory of its layers
    tile_mpp: float = Field(gt=0)
    grid: int = Field(gt=0)
    layers: int
    heads: int
    feature_width: int = Field(gt=0)
    calibration: Calibration
    conformal: Conformal | None
    gate: Gate
    maps: Maps
    metrics: list[Metric]
    data: list[DataSource]
    intended_use: str
    limits: list[str]
    weights_licence: str
    files: list[File]
    variants: dict[Precision, Variant]
    golden: Golden
    versions: dict[str, str]  # torch, onnxruntime, pillow, git commit

    @model_validator(mode="after")
    def agree_with_itself(self) -> "Manifest":
        names = [c.name for c in self.classes]
        if len(set(names)) != len(names):
            raise ValueError(f"class names must differ, got {names}")
        if len(self.golden.probabilities) != len(names):
            raise ValueError(f"golden has {len(self.golden.probabilities)} probabilities for {len(names)} classes")
        if unbounded := set(self.precisions()) - set(self.golden.tolerance):
            raise ValueError(f"golden has no tolerance for {sorted(unbounded)}")
        if self.tile_px % self.grid:
            raise ValueError(f"tile_px {self.tile_px} is not a multiple of the grid {self.grid}")
        if self.maps.default not in self.maps.methods:
            raise ValueError(f"the default map {self.maps.default} is none of the methods {self.maps.methods}")
        needs_reference = self.gate.max_foreign_share is not None or self.gate.max_distance is not None
        if needs_reference and not self.has("reference"):
            raise ValueError("the gate has limits on colours or distance, but no file of role reference is listed")
        if self.conformal and any(len(row) != len(names) for row in self.conformal.thresholds):
            raise ValueError("conformal thresholds must be one per class")
        if self.conformal and len(self.conformal.thresholds) != len(self.conformal.coverages):
            raise ValueError("conformal thresholds must be one list per coverage")
        if self.conformal and self.conformal.default not in self.conformal.coverages:
            raise ValueError(f"the default coverage {self.conformal.default} is none of {self.conformal.coverages}")
        return self

    @property
    def class_names(self) -> list[str]:
        return [c.name for c in self.classes]

    @property
    def attended_share(self) -> float:
        """The share of a logit that passes through attention: other heads may read the patches, or colours, before any
        layer. At least: where colours are unknown their head has less than its share.
        """
        shares = [self.architecture.sizes.get(name, 0.0) for name in ("early_share", "colour_share")]
        return math.prod(1.0 - share for share in shares if isinstance(share, int | float))

    def precisions(self) -> list[Precision]:
        return [f.precision for f in self.files if f.role == "predict" and f.precision]

    def has(self, role: Role) -> bool:
        return any(file.role == role for file in self.files)

    def file(self, role: Role, precision: Precision | None = None) -> File:
        for file in self.files:
            if file.role == role and precision in (None, file.precision):
                return file
        raise CorruptArtifact(f"{self.name} has no {role} file of precision {precision}; it has {self.precisions()}")


def read_manifest(folder: Path) -> Manifest:
    path = folder / MANIFEST
    if not folder.is_dir():
        raise CorruptArtifact(f"an artefact is a folder, and there is no folder {folder}")
    if not path.is_file():
        raise CorruptArtifact(f"{folder} holds no {MANIFEST}: it is no artefact; `tissue-train export` writes one")
    try:
        with reading(path):
            return Manifest.model_validate_json(path.read_bytes())
    except ValidationError as error:
        raise CorruptArtifact(f"{path} is not a manifest of format {FORMAT}: {error}") from error


def write_manifest(manifest: Manifest, folder: Path) -> None:
    (folder / MANIFEST).write_text(manifest.model_dump_json(indent=2) + "\n")


def verify_files(manifest: Manifest, folder: Path) -> None:
    listed = {MANIFEST, *(file.path for file in manifest.files)}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder)
        is_hidden = any(part.startswith(".") for part in name.parts)  # Kubernetes mounts files through such folders
        if path.is_file() and not is_hidden and str(name) not in listed and name.suffix not in NOTES:
            raise CorruptArtifact(f"{folder} holds {name}, which the manifest does not list: a graph might read it")
    for file in manifest.files:
        path = folder / file.path
        if not path.is_file():
            raise CorruptArtifact(f"{path} is missing, though the manifest lists it")
        with reading(path):
            found = digest(path)
        if found != file.sha256:
            raise CorruptArtifact(
                f"{path} is not the file the manifest lists: expected sha256 {file.sha256} ({file.bytes} bytes), "
                f"found {found} ({path.stat().st_size} bytes); get the artefact again"
            )


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Says which file can't be read: a container's user often mustn't read what somebody else has put there."""
    try:
        yield
    except OSError as error:
        raise CorruptArtifact(f"{path} can't be read: {error.strerror}") from error


def describe_file(path: Path, role: Role, precision: Precision | None = None) -> File:
    return File(path=path.name, role=role, precision=precision, sha256=digest(path), bytes=path.stat().st_size)


def digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
