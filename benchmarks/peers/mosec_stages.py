"""mosec: decoding in a stage of its own with a process a core, the model behind it in batches of up to 8."""

import os
from typing import Any

import numpy as np
import onnxruntime as ort
from mosec import Server, Worker
from mosec.errors import ValidationError
from numpy.typing import NDArray

from benchmarks.peers.tile import MODEL, describe, read_tile


class Preprocess(Worker):
    def deserialize(self, data: bytes) -> bytes:
        return data

    def forward(self, data: bytes) -> NDArray[np.uint8]:
        try:
            return read_tile(data)
        except OSError as error:
            raise ValidationError(f"not an image: {error}") from error


class Inference(Worker):
    def __init__(self) -> None:
        self.session = ort.InferenceSession(MODEL)

    def forward(self, tiles: list[NDArray[np.uint8]]) -> list[dict[str, Any]]:
        (probabilities,) = self.session.run(["probabilities"], {"tiles": np.stack(tiles)})
        return [describe(row) for row in probabilities]


if __name__ == "__main__":
    server = Server()
    server.append_worker(Preprocess, num=len(os.sched_getaffinity(0)))
    server.append_worker(Inference, max_batch_size=8, max_wait_time=2)
    server.run()
