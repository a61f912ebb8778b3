"""Images that show one field: found by their looks or read from a table, and kept together ever after."""

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from training.data import BadTable, Indices, Pixels, Scan, read_rows

Pair = tuple[int, int]

SMALL_SIDE_PX = 30
# Measured at this size: one field recompressed, enlarged or mirrored .997 and more; different ones at most .88 (of
# 12,881 coarse colon fields, with glass at an edge), .75 (fat and glass), .61 (179 tiles of six tissues).
NEAR_DUPLICATE_CORRELATION = 0.95
BLOCK = 1000  # tiles; bounds the matrix to 4 MB x their number / 1000


def find_near_duplicates(tiles: Pixels) -> list[Pair]:
    """Pairs (i < j) that show one field, whatever was done to its colour, size, orientation or compression."""
    upright = small_grey(tiles)
    flat = upright.reshape(len(tiles), -1)
    pairs: set[Pair] = set()
    for turned in eight_symmetries(upright):
        turned_flat = turned.reshape(len(tiles), -1)
        for start in range(0, len(tiles), BLOCK):
            # a symmetry that takes j to i has its inverse among the eight, so i < j is enough
            correlation = flat[start : start + BLOCK] @ turned_flat[start:].T
            near = np.argwhere(correlation >= NEAR_DUPLICATE_CORRELATION) + start
            pairs |= {(int(i), int(j)) for i, j in near if i < j}
    return sorted(pairs)


def small_grey(tiles: Pixels) -> NDArray[np.float32]:
    """(N, 30, 30), each of mean 0 and norm 1, so that a product is a correlation."""
    n, s = tiles.shape[:2]
    edges = np.arange(SMALL_SIDE_PX) * s // SMALL_SIDE_PX
    grey = np.empty((n, SMALL_SIDE_PX, SMALL_SIDE_PX), np.float32)
    for small, tile in zip(grey, tiles, strict=True):
        rows = np.add.reduceat(tile.sum(axis=2, dtype=np.float32), edges, axis=0)
        small[:] = np.add.reduceat(rows, edges, axis=1)
    widths = np.diff(edges, append=s)
    grey /= np.outer(widths, widths).astype(np.float32)
    grey -= grey.mean(axis=(1, 2), keepdims=True)
    norms = np.linalg.norm(grey, axis=(1, 2), keepdims=True)
    return np.asarray(grey / np.maximum(norms, 1e-6))  # a flat tile looks like none


def eight_symmetries(images: NDArray[np.float32]) -> Iterator[NDArray[np.float32]]:
    for quarter_turns in range(4):
        turned = np.rot90(images, quarter_turns, axes=(1, 2))
        yield turned
        yield turned[:, ::-1]


def read_pairs(table: Path, scanned: Scan) -> list[Pair]:
    numbers = {record.path.resolve(): i for i, record in enumerate(scanned.records)}
    numbers |= {twice.resolve(): numbers[first.resolve()] for first, twice in scanned.duplicates}
    return sorted({(min(pair), max(pair)) for pair in number_pairs(table, numbers)})


def number_pairs(table: Path, numbers: Mapping[Path, int]) -> list[Pair]:
    """A CSV of near-duplicate files, columns `a` and `b`, seen from the table's folder or from the one above it.

    `numbers`: of the images that matter, by their resolved paths.
    """
    rows = read_rows(table, ["a", "b"])  # none where nothing looks alike

    def places(file: str) -> list[Path]:
        return [(base / file.replace("\\", "/")).resolve() for base in (table.parent, table.parent.parent)]

    if rows and not any(place.exists() for row in rows for place in places(row["a"])):
        raise BadTable(f"{table} names no file that is there; the first is {rows[0]['a']}")
    pairs = []
    for row in rows:
        a, b = (next((numbers[place] for place in places(row[column]) if place in numbers), None) for column in "ab")
        if a is not None and b is not None and a != b:  # else one of them is of a class not asked for, or unreadable
            pairs.append((a, b))
    return pairs


def group_pairs(n: int, pairs: Iterable[Pair]) -> Indices:
    """A group number for each of n: the same for all that a chain of pairs connects."""
    group = np.arange(n)
    for i, j in pairs:
        group[group == group[j]] = group[i]
    return group
