"""The fields of a pretraining's sources, with what is marked on them: nuclei, glands, or a class for each image."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from model.pixels import decode
from training.config import BadConfig, Source
from training.data import class_folders, images_below, naming, rows_of
from training.twins import group_pairs, number_pairs

Pixels = NDArray[np.uint8]
NO_LABEL = -1  # what torch's cross-entropy is told to ignore
MOST_GRADES = 2  # the one logit of a grade tells two apart


@dataclass(frozen=True)
class Field:
    """One image with all that is marked on it."""

    pixels: Pixels  # (height, width, 3)
    group: str  # the patient, or else the file: fields of one group are learnt or held out together
    label: int = NO_LABEL  # of the whole image
    points: NDArray[np.float32] | None = None  # (n, 3): x, y, kind
    mask: Image.Image | None = None  # L, 255 inside glands
    grade: int = NO_LABEL  # of all its glands


@dataclass(frozen=True)
class Collection:
    """A source, read: its fields and the names of what is marked."""

    source: Source
    names: list[str]  # classes, kinds of nuclei, or grades; none of images alone
    fields: list[Field]
    held_out: list[Field]

    @property
    def task(self) -> str:
        return self.source.folder.name


def read_source(source: Source) -> Collection:
    readers = {"classes": read_classes, "points": read_points, "masks": read_masks, "images": read_images}
    read = readers[source.kind]
    names, fields = read(source)
    if not fields:
        raise BadConfig(f"source '{source.folder}' holds no images of kind '{source.kind}'")
    groups = sorted({field.group for field in fields})
    order = np.random.default_rng(0).permutation(len(groups))
    away = {groups[i] for i in order[: round(source.held_out * len(groups))]}
    learnt = [field for field in fields if field.group not in away]
    if not learnt:
        raise BadConfig(
            f"source '{source.folder}' has {len(groups)} groups of images, and held_out = {source.held_out:g} leaves "
            "none of them to learn from: set it lower"
        )
    return Collection(source, names, learnt, [field for field in fields if field.group in away])


def read_classes(source: Source) -> tuple[list[str], list[Field]]:
    """Near duplicates, as a table lists them, get the name of one, so that none is learnt and held out at once."""
    folders = class_folders(source.folder)
    labels = {path: label for label, folder in enumerate(folders) for path in images_below(folder)}
    paths = list(labels)
    numbers = {path.resolve(): number for number, path in enumerate(paths)}
    pairs = number_pairs(source.folder / source.table, numbers) if source.table else []
    groups = [paths[group].as_posix() for group in group_pairs(len(paths), pairs)]
    fields = [Field(read_pixels(path), group, labels[path]) for path, group in zip(paths, groups, strict=True)]
    return [folder.name for folder in folders], fields


def read_points(source: Source) -> tuple[list[str], list[Field]]:
    rows = read_marks(source, ["image", "x", "y", "kind"])
    names = sorted({row["kind"] for row in rows})
    points: dict[str, list[tuple[float, float, int]]] = {}
    for row in rows:
        points.setdefault(row["image"], []).append((float(row["x"]), float(row["y"]), names.index(row["kind"])))
    patients = {row["image"]: row.get("patient") or row["image"] for row in rows}
    fields = []
    for image in sorted(points):
        pixels = read_pixels(source.folder / "images" / image)
        fields.append(Field(pixels, patients[image], points=np.array(points[image], np.float32)))
    return names, fields


def read_masks(source: Source) -> tuple[list[str], list[Field]]:
    rows = read_marks(source, ["image", "mask", "grade"])
    names = sorted({row["grade"] for row in rows})
    if len(names) > MOST_GRADES:
        raise BadConfig(
            f"source '{source.folder}' has glands of {len(names)} grades ({', '.join(names)}), expected {MOST_GRADES} "
            f"at most: merge some in column grade of {source.table}"
        )
    fields = []
    for row in rows:
        mask = Image.open(source.folder / row["mask"]).convert("L")
        pixels, patient = read_pixels(source.folder / row["image"]), row.get("patient") or row["image"]
        fields.append(Field(pixels, patient, mask=mask, grade=names.index(row["grade"])))
    return names, fields


def read_images(source: Source) -> tuple[list[str], list[Field]]:
    return [], [Field(read_pixels(path), path.as_posix()) for path in images_below(source.folder)]


def read_marks(source: Source, columns: list[str]) -> list[dict[str, str]]:
    if source.table is None:
        raise BadConfig(f"source '{source.folder}' of kind '{source.kind}' needs a table")
    return rows_of(source.folder / source.table, columns)


def read_pixels(path: Path) -> Pixels:
    with naming(path):
        return decode(path.read_bytes()).rgb
