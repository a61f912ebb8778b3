"""What all peers share: the image as each of them would read it, and the words for the answer."""

import io
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

MODEL = Path(os.environ["BENCH_MODEL"])  # an ONNX graph: `tiles` (N, S, S, 3) uint8 in, `probabilities` (N, K) out
TILE_PX = int(os.environ["BENCH_TILE_PX"])
CLASSES: list[str] = json.loads(os.environ["BENCH_CLASSES"])


def read_tile(data: bytes) -> NDArray[np.uint8]:
    return to_tile(Image.open(io.BytesIO(data)))


def to_tile(image: Image.Image) -> NDArray[np.uint8]:
    """(S, S, 3), the centre square of the picture."""
    return np.asarray(ImageOps.fit(image.convert("RGB"), (TILE_PX, TILE_PX), Image.Resampling.BICUBIC))


def describe(probabilities: NDArray[np.float32]) -> dict[str, Any]:
    shares = dict(zip(CLASSES, probabilities.tolist(), strict=True))
    return {"label": max(shares, key=lambda name: shares[name]), "probabilities": shares}
