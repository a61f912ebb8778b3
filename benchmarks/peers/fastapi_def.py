"""Plain FastAPI, `def`: each request in a thread of the pool, one tile a call.

Twice in the table: ONNX Runtime as it comes, with a pool of threads for all callers (BENCH_INTRA_THREADS=0); and told
to use one thread a call, so that callers share the cores (1).
"""

import os
from typing import Annotated, Any

import onnxruntime as ort
from fastapi import Body, FastAPI

from benchmarks.peers.tile import MODEL, describe, read_tile

options = ort.SessionOptions()
options.intra_op_num_threads = int(os.environ["BENCH_INTRA_THREADS"])
session = ort.InferenceSession(MODEL, options)
app = FastAPI()


@app.post("/predict")
def predict(data: Annotated[bytes, Body(media_type="image/*")]) -> dict[str, Any]:
    (probabilities,) = session.run(["probabilities"], {"tiles": read_tile(data)[None]})
    return describe(probabilities[0])
