"""LitServe: base64 in JSON, as its image examples have it (raw bodies it refuses); batches of up to 8.

The short batch_timeout is its remedy for the default of 0, with which it spins when idle.
"""

import base64
import os
from typing import Any

import litserve as ls
import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from benchmarks.peers.tile import MODEL, describe, read_tile


class TissueAPI(ls.LitAPI):
    def setup(self, device: str) -> None:
        self.session = ort.InferenceSession(MODEL)

    def decode_request(self, request: dict[str, str]) -> NDArray[np.uint8]:
        return read_tile(base64.b64decode(request["image"]))

    def batch(self, inputs: list[NDArray[np.uint8]]) -> NDArray[np.uint8]:
        return np.stack(inputs)

    def predict(self, x: NDArray[np.uint8]) -> NDArray[np.float32]:
        probabilities: NDArray[np.float32] = self.session.run(["probabilities"], {"tiles": x})[0]
        return probabilities

    def encode_response(self, output: NDArray[np.float32]) -> dict[str, Any]:
        return describe(output)


if __name__ == "__main__":
    api = TissueAPI(max_batch_size=8, batch_timeout=0.002)
    server = ls.LitServer(api, accelerator="cpu", fast_queue=True)
    server.run(host="127.0.0.1", port=int(os.environ["BENCH_PORT"]), generate_client_file=False)
