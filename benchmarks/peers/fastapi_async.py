"""Plain FastAPI, `async def`: decode and model on the event loop, as in many a tutorial and in peers' comparisons."""

from typing import Any

import onnxruntime as ort
from fastapi import FastAPI, Request

from benchmarks.peers.tile import MODEL, describe, read_tile

session = ort.InferenceSession(MODEL)
app = FastAPI()


@app.post("/predict")
async def predict(request: Request) -> dict[str, Any]:
    tile = read_tile(await request.body())
    (probabilities,) = session.run(["probabilities"], {"tiles": tile[None]})
    return describe(probabilities[0])
