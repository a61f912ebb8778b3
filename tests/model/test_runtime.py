import os
import subprocess
import sys

CODE = "import os; from model.runtime import ort; print(os.environ['ORT_DISABLE_TELEMETRY'], ort.__name__)"


def test_onnx_runtime_is_told_not_to_report_before_it_loads():
    environ = {name: value for name, value in os.environ.items() if name != "ORT_DISABLE_TELEMETRY"}
    done = subprocess.run([sys.executable, "-c", CODE], env=environ, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["1", "onnxruntime"]


def test_nothing_loads_it_any_other_way():
    code = "import sys, app.main, app.doctor; assert 'ORT_DISABLE_TELEMETRY' in __import__('os').environ"
    subprocess.run([sys.executable, "-c", code], check=True)
