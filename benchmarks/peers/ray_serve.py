"""Ray Serve: raw bodies, batches of up to 8 in one replica."""

import os
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray
from ray import serve
from starlette.requests import Request

from benchmarks.peers.tile import MODEL, describe, read_tile


@serve.deployment(max_ongoing_requests=256)  # with its default of 5 no batch would fill
class Tissue:
    def __init__(self) -> None:
        self.session = ort.InferenceSession(MODEL)

    @serve.batch(max_batch_size=8, batch_wait_timeout_s=0.002)
    async def predict(self, tiles: list[NDArray[np.uint8]]) -> list[dict[str, Any]]:
        (probabilities,) = self.session.run(["probabilities"], {"tiles": np.stack(tiles)})
        return [describe(row) for row in probabilities]

    async def __call__(self, request: Request) -> dict[str, Any]:
        answer: dict[str, Any] = await self.predict(read_tile(await request.body()))
        return answer


if __name__ == "__main__":
    serve.start(http_options={"host": "127.0.0.1", "port": int(os.environ["BENCH_PORT"])})
    application: Any = Tissue
    serve.run(application.bind(), route_prefix="/predict", blocking=True)
