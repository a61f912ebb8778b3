"""Labelled images on disk: a folder of them becomes records, and records become tiles.

Any tree with a folder per class is read, with an optional CSV beside it. Nothing is decided in silence: what could not
be read and what is there twice is reported.
"""

import csv
import difflib
import hashlib
import logging
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import track

from model import pixels
from model.pixels import ImageRefused
from training.synthetic import KINDS

log = logging.getLogger(__name__)

Pixels = NDArray[np.uint8]
Indices = NDArray[np.intp]

# What people call an image. `pixels.decode` accepts fewer, and says why not; all other files are passed over.
IMAGE_SUFFIX = re.compile(r"\.(png|jpe?g|tiff?|webp|bmp|gif|jp2|heic|avif|svs|ndpi|dcm)", re.IGNORECASE)
TABLE_COLUMNS = ("file", "label", "slide", "quality")
LONG_READ = 1000  # images from which on a progress bar is worth its line
WHY_CUT = {
    "request": "at the um/px that was given they show more than a tile",
    "tag": "by the um/px in their files they show more than a tile",
    "unknown": "they are not square",
}


class NoClasses(ValueError):
    pass


class EmptyClass(ValueError):
    pass


class AmbiguousClass(ValueError):
    pass


class BadTable(ValueError):
    pass


class UnusableImage(ValueError):
    pass


@dataclass(frozen=True)
class Record:
    path: Path
    label: str
    slide: str | None
    sha256: str  # of the file
    quality: str | None  # as the table has it


@dataclass(frozen=True)
class Scan:
    records: list[Record]
    unreadable: list[tuple[Path, str]]  # with the reason
    duplicates: list[tuple[Path, Path]]  # the one kept, and the same bytes again
    classes: list[str]


def tell_skipped(scanned: Scan) -> None:
    """Else an n that is smaller than the folder would be the only sign."""
    for path, reason in scanned.unreadable:
        log.warning("skipped %s: %s", path, reason)
    for kept, dropped in scanned.duplicates:
        log.warning("dropped %s: the same bytes as %s", dropped, kept)


def scan(
    folder: Path, table: Path | None = None, classes: Sequence[str] | None = None, *, needs_all: bool = True
) -> Scan:
    """`table`: CSV with a column `file` (seen from `folder`) and any of `label`, `slide`, `quality`, which override
    what the names of folders and files say. `classes`: only these, in this order; else all, in the folders' order.
    """
    rows = read_table(table) if table else {}
    labels = find_images(folder, rows, classes, needs_all)
    if table:
        tell_absent(folder, rows, table)
    first_with: dict[str, Record] = {}  # these bytes, by their hash
    unreadable, duplicates, contradictions = [], [], []
    for path in progress(list(labels), f"reading {folder.name}"):
        try:
            data = path.read_bytes()
            pixels.decode(data)
        except (ImageRefused, OSError) as error:
            unreadable.append((path, str(error)))
            continue
        row = rows.get(path.relative_to(folder).as_posix(), {})
        record = make_record(path, labels[path], data, row)
        first = first_with.setdefault(record.sha256, record)
        if first is not record:
            duplicates.append((first.path, path))
            if first.label != record.label:
                contradictions.append(f"{first.path} and {path}")

    if contradictions:
        raise AmbiguousClass(f"the same image in two classes: {'; '.join(contradictions)}. Take the wrong one away")
    there = dict.fromkeys(labels.values())
    in_order = [label for label in classes if label in there] if classes else list(there)
    scanned = Scan(list(first_with.values()), unreadable, duplicates, in_order)
    refuse_unread_classes(scanned, labels)
    return scanned


def make_record(path: Path, label: str, data: bytes, row: dict[str, str]) -> Record:
    slide = row.get("slide") or slide_in(path.name)
    return Record(path, label, slide, hashlib.sha256(data).hexdigest(), row.get("quality") or None)


def find_images(
    folder: Path, rows: dict[str, dict[str, str]], classes: Sequence[str] | None, needs_all: bool
) -> dict[Path, str]:
    """All image files and their labels: the table's, else the folder's."""
    labels: dict[Path, str] = {}
    folder_of: dict[str, Path] = {}
    for class_folder in class_folders(folder):
        label = class_name(class_folder.name)
        first = folder_of.setdefault(label, class_folder)
        if first is not class_folder:
            raise AmbiguousClass(f"{first} and {class_folder} both mean {label}: put their images into one of them")
        files = images_below(class_folder)
        if not files and (classes is None or label in classes):
            raise EmptyClass(f"{class_folder} holds no images: put some in, or take the folder away")
        labels |= dict.fromkeys(files, label)
    labels |= {folder / file: row["label"] for file, row in rows.items() if row.get("label")}

    present = list(dict.fromkeys(labels.values()))
    refuse_too_few_classes(folder, present, classes or [], needs_all)
    if classes and not needs_all:
        tell_unknown_classes(labels, classes)
    return {path: label for path, label in labels.items() if classes is None or label in classes}


def refuse_too_few_classes(folder: Path, present: list[str], wanted: Sequence[str], needs_all: bool) -> None:
    if len(present) < 2:
        inner = [path for path in class_folders(folder) if class_folders(path)]
        hint = f". Did you mean {inner[0]}?" if inner else ""
        came = f"one class, {present[0]}" if present else "no folders with images"
        raise NoClasses(f"{folder} holds {came}; expected a folder for each of two classes or more{hint}")
    missing = [label for label in wanted if label not in present]
    if missing and (needs_all or len(missing) == len(wanted)):
        raise NoClasses(f"{folder} has no class {', '.join(missing)}; it has {', '.join(present)}")


def tell_unknown_classes(labels: dict[Path, str], known: Sequence[str]) -> None:
    """Else `High grade` for `high grade` would only make an n smaller."""
    unknown = Counter(label for label in labels.values() if label not in known)
    if unknown:
        counts = ", ".join(f"{n} of {label}" for label, n in unknown.items())
        log.warning("left out, as they are of no class of the artefact's: %s; it has %s", counts, ", ".join(known))


def class_folders(folder: Path) -> list[Path]:
    if not folder.is_dir():
        raise NoClasses(f"there is no folder {folder}")
    return sorted(path for path in folder.iterdir() if path.is_dir() and path.name[0] not in "._")


def images_below(folder: Path) -> list[Path]:
    found = [path for path in folder.rglob("*") if IMAGE_SUFFIX.fullmatch(path.suffix)]
    seen = [path for path in found if not any(part.startswith(".") for part in path.relative_to(folder).parts)]
    return sorted(seen, key=lambda path: path.as_posix())


def unlabelled_images(folder: Path) -> list[Path]:
    if not (images := images_below(folder)):
        raise NoClasses(f"{folder} holds no images: put some in, or name another folder")
    return images


def class_name(folder_name: str) -> str:
    """The Kather set's `01_TUMOR` is Tumor; any other name stands as it is."""
    numbered = re.fullmatch(r"\d\d_([A-Z]+)", folder_name)
    name = numbered[1].capitalize() if numbered else ""
    return name if name in KINDS else folder_name


def slide_in(file_name: str) -> str | None:
    """The Kather set's `17E8F_CRC-Prim-HE-02_007.tif_Row_151_Col_301.tif` was cut from slide 02."""
    named = re.search(r"CRC-Prim-HE-(\d+)", file_name)
    return named[1] if named else None


def read_table(table: Path) -> dict[str, dict[str, str]]:
    """Rows by file name, slashes as here."""
    rows = rows_of(table, ["file"])
    refuse_misspelt_columns(table, [column for column in rows[0] if column])
    return {Path(row["file"].replace("\\", "/")).as_posix(): row for row in rows}


def refuse_misspelt_columns(table: Path, columns: Sequence[str]) -> None:
    """`slide_id` would leave all slides unknown."""
    absent = [name for name in TABLE_COLUMNS if name not in columns]
    for column in columns:
        if column in TABLE_COLUMNS:
            continue
        near = difflib.get_close_matches(column.lower(), absent, n=1, cutoff=0.7)  # `site` is no `slide`
        if near:
            raise BadTable(
                f"{table} has no column {near[0]}, but {column}: rename it to {near[0]}, or, if it tells something "
                "else, to a name less like that"
            )
    log.info("%s: read are the columns %s", table, ", ".join(name for name in TABLE_COLUMNS if name in columns))


def tell_absent(folder: Path, rows: dict[str, dict[str, str]], table: Path) -> None:
    absent = [file for file in rows if not (folder / file).exists()]
    if len(absent) == len(rows):
        raise BadTable(
            f"{table} names no file that is there: its column file has to tell them as seen from {folder}, "
            f"class folder included; the first is {absent[0]}"
        )
    if absent:
        log.warning("%d of %d rows of %s match no file, such as %s", len(absent), len(rows), table, absent[0])


def rows_of(table: Path, required: Sequence[str]) -> list[dict[str, str]]:
    rows = read_rows(table, required)
    if not rows:
        raise BadTable(f"{table} has no rows below its header")
    return rows


def read_rows(table: Path, required: Sequence[str]) -> list[dict[str, str]]:
    """An empty list where nothing follows the header."""
    try:
        with table.open(newline="", encoding="utf-8-sig") as file:  # with or without the mark that Excel writes
            reader = csv.DictReader(file, restval="")
            rows, columns = list(reader), list(reader.fieldnames or [])
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise BadTable(f"{table} cannot be read: {error}") from error
    missing = [column for column in required if column not in columns]
    if missing:
        raise BadTable(f"{table} has no column {', '.join(missing)}; it has {', '.join(columns) or 'no rows'}")
    return rows


def refuse_unread_classes(scanned: Scan, labels: dict[Path, str]) -> None:
    for label in scanned.classes:
        if any(record.label == label for record in scanned.records):
            continue
        path, reason = next(failed for failed in scanned.unreadable if labels[failed[0]] == label)
        raise EmptyClass(f"no image of class {label} could be used: {path}: {reason}")


def load_tiles(records: Sequence[Record], tile_px: int, tile_mpp: float, mpp: float | None = None) -> Pixels:
    return load_images([record.path for record in records], tile_px, tile_mpp, mpp)


def load_images(paths: Sequence[Path], tile_px: int, tile_mpp: float, mpp: float | None = None) -> Pixels:
    """(N, S, S, 3), by the very functions that serve. `mpp`: of all these images, whatever their files tell."""
    tiles = np.empty((len(paths), tile_px, tile_px, 3), np.uint8)
    cut: Counter[str] = Counter()
    for place, path in zip(tiles, progress(paths, "loading"), strict=True):
        place[:] = load_tile(path, tile_px, tile_mpp, mpp, cut)
    tell_cut(cut, len(paths))
    return tiles


def load_usable(records: Sequence[Record], tile_px: int, tile_mpp: float) -> tuple[list[Record], Pixels, list[str]]:
    """All that are large enough for a tile by their files' own um/px: records and tiles; and why each other is not."""
    tiles = np.empty((len(records), tile_px, tile_px, 3), np.uint8)
    usable: list[Record] = []
    refused: list[str] = []
    cut: Counter[str] = Counter()
    for record in progress(records, "loading"):
        try:
            tiles[len(usable)] = load_tile(record.path, tile_px, tile_mpp, None, cut)
            usable.append(record)
        except UnusableImage as error:
            refused.append(str(error))
    tell_cut(cut, len(usable))
    return usable, tiles[: len(usable)], refused


def load_tile(path: Path, tile_px: int, tile_mpp: float, mpp: float | None, cut: Counter[str]) -> Pixels:
    """`cut`: counts what showed more than a tile, by where its um/px came from."""
    with naming(path):
        picture = pixels.decode(path.read_bytes())
        tile = pixels.to_tile(picture, tile_px, tile_mpp, mpp)
    if tile.box != (0, 0, *picture.rgb.shape[1::-1]):
        cut[tile.mpp_source] += 1
    return tile.pixels


def tell_cut(cut: Counter[str], n: int) -> None:
    for source, n_cut in cut.items():
        log.warning("%d of %d images were cut to their middle: %s", n_cut, n, WHY_CUT[source])


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Adds the file's name to the reason, since what refuses an image knows nothing but its bytes."""
    try:
        yield
    except (ImageRefused, OSError) as error:
        raise UnusableImage(f"{path}: {error}") from error


def number_labels(records: Sequence[Record], classes: Sequence[str]) -> Indices:
    numbers = {label: number for number, label in enumerate(classes)}
    return np.array([numbers[record.label] for record in records], dtype=np.intp)


def group_by_slide(records: Sequence[Record]) -> Indices:
    """A group number for each image: the same for all of one slide, its own where the slide is unknown."""
    slides = [record.slide or f"unknown, {i}" for i, record in enumerate(records)]
    return np.unique(slides, return_inverse=True)[1]


def name_slides(records: Sequence[Record]) -> set[str]:
    return {record.slide for record in records if record.slide}


T = TypeVar("T")


def progress(items: Sequence[T], what: str) -> Iterable[T]:
    """A bar on stderr, so that stdout stays data."""
    return track(items, what, console=Console(stderr=True), disable=len(items) < LONG_READ)
