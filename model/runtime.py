"""ONNX Runtime, told not to report to its maker: from 1.29 on it sends telemetry unless this is set before it loads."""

import os

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

import onnxruntime

ort = onnxruntime
