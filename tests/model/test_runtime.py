import os
import subprocess
import sys

import pytest

WATCH = """
import os, sys

class Watch:
    def find_spec(self, name, path=None, target=None):
        assert name != "onnxruntime" or os.environ.get("ORT_DISABLE_TELEMETRY") == "1", "it would report"

sys.meta_path.insert(0, Watch())
"""


def load(module: str) -> subprocess.CompletedProcess[str]:
    environ = {name: value for name, value in os.environ.items() if name != "ORT_DISABLE_TELEMETRY"}
    return subprocess.run(
        [sys.executable, "-c", f"{WATCH}import {module}"], env=environ, capture_output=True, text=True
    )


@pytest.mark.parametrize("module", ["app.main", "app.doctor", "training.export"])
def test_onnx_runtime_is_told_not_to_report_before_it_loads(module):
    done = load(module)
    assert done.returncode == 0, done.stderr


def test_the_watch_notices():
    assert "it would report" in load("onnxruntime").stderr
