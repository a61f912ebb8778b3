"""BentoML: an image as a form, adaptive batches of up to 8."""

from typing import Any

import bentoml
import numpy as np
import onnxruntime as ort
from PIL.Image import Image

from benchmarks.peers.tile import MODEL, describe, to_tile


@bentoml.service(threads=4)
class Tissue:
    def __init__(self) -> None:
        self.session = ort.InferenceSession(MODEL)

    @bentoml.api(batchable=True, max_batch_size=8)
    def predict(self, image: list[Image]) -> list[dict[str, Any]]:
        tiles = np.stack([to_tile(one) for one in image])
        (probabilities,) = self.session.run(["probabilities"], {"tiles": tiles})
        return [describe(row) for row in probabilities]
