"""Schemathesis holds the real process to the OpenAPI document that it serves.

This module is also what it gets its images from. For many more cases than here:
`SCHEMATHESIS_HOOKS=tests.app.test_contract schemathesis --config-file tests/app/schemathesis.toml run URL -n 300`
"""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import schemathesis
from hypothesis import strategies as st

from app.intake import ACCEPTED_TYPES, ANY_BYTES
from tests.app.conftest import ROOT, Process, encode
from training.synthetic import draw_tile

POSTS = ("/predict", "/predict/batch", "/attention", "/features")


def draw_images(form: str) -> st.SearchStrategy[bytes]:
    """Mostly good ones, since the answers to those promise most."""
    good = [encode(draw_tile(kind, 1), form) for kind in range(2)]
    bad = [good[0][:100], good[0][:-1], encode(np.zeros((20, 20, 3), np.uint8), form), b"", b"rubbish"]
    return st.sampled_from(good * 4 + bad)


for media_type in ACCEPTED_TYPES:
    form = "PNG" if media_type == ANY_BYTES else media_type.removeprefix("image/").upper()
    schemathesis.openapi.media_type(media_type, draw_images(form))


def test_the_service_keeps_what_its_document_promises(server):
    config = Path(__file__).with_name("schemathesis.toml")
    before = count_answers(server)
    run = subprocess.run(
        [sys.executable, "-m", "schemathesis.cli", f"--config-file={config}", "run", f"{server.url}/openapi.json"],
        cwd=ROOT,
        env=os.environ | {"SCHEMATHESIS_HOOKS": __name__},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    for (path, status), count in count_answers(server).items():
        assert count > before[path, status] + 5, f"too few cases: {path} answered {status} only {count} times"


def count_answers(server: Process) -> dict[tuple[str, int], float]:
    """Of the routes that take images: how often one was judged, and how often the request was found wanting."""
    counter = 'tissue_requests_total{{method="POST",route="{}",status="{}"}}'
    return {(path, status): server.read_metric(counter.format(path, status)) for path in POSTS for status in (200, 422)}
