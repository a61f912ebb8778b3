"""What a service answers, for tests of those who read it."""

from typing import Any

PREDICTION: dict[str, Any] = {
    "label": "Tumor",
    "confidence": 0.9,
    "probabilities": {"Tumor": 0.9, "Stroma": 0.1},
    "prediction_set": {"labels": ["Tumor"], "coverage": 0.9},
    "verdict": "ok",
    "reasons": [],
    "warnings": [],
    "quality": {
        "tissue_share": 0.94,
        "sharpness": 412.7,
        "brightness": 118.4,
        "odd_share": 0.002,
        "blue_absorption": 0.59,
        "foreign_share": None,
        "distance": None,
    },
    "tta": None,
    "input": {
        "width": 150,
        "height": 150,
        "format": "PNG",
        "mpp": None,
        "mpp_source": "unknown",
        "sha256": "0" * 64,
        "box": [0, 0, 150, 150],
    },
    "model": {"name": "default", "version": "1", "digest": "0" * 64, "device": "cpu", "precision": "fp32"},
}


def write_problem(code: str, detail: str) -> dict[str, Any]:
    return {"type": f"urn:tissue:problem:{code}", "title": "No", "status": 422, "detail": detail, "code": code}
