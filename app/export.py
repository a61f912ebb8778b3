"""Answers as rows for spreadsheets: the columns of the page's export.js, under the same names and in the same order."""

import math
from collections.abc import Iterable, Mapping
from typing import Any

from app.schemas import Input, Model, Quality, Views

Answer = dict[str, Any]  # `file`, of a tile in a grid its `box`, and the prediction or the `error`

FORMULA_STARTS = ("=", "+", "-", "@", "\t", "\r")


def list_columns(classes: Iterable[str], box: Iterable[str] = ()) -> list[str]:
    return [
        "file",
        *prefix("box_", box),
        *("status", "label", "confidence", "doubt", "verdict", "reasons", "warnings"),
        *prefix("p_", classes),
        *("set", "coverage"),
        *prefix("quality_", Quality.model_fields),
        *prefix("tta_", Views.model_fields),
        *prefix("input_", Input.model_fields),
        *prefix("model_", Model.model_fields),
        *("request_id", "error_code", "error"),
    ]


def flatten(answer: Answer) -> dict[str, Any]:
    """The cells of an answer, by column; those that it has nothing for are left out."""
    cells = {"file": answer["file"], **spread("box_", answer.get("box"))}
    cells |= describe_failure(answer["error"]) if "error" in answer else describe_prediction(answer)
    return {column: disarm(cell) for column, cell in cells.items()}


def describe_failure(problem: Mapping[str, Any]) -> dict[str, Any]:
    error = f"{problem.get('title')}: {problem['detail']}"
    return {
        "status": "failed",
        "request_id": problem.get("request_id"),
        "error_code": problem.get("code"),
        "error": error,
    }


def describe_prediction(answer: Answer) -> dict[str, Any]:
    chosen = answer["prediction_set"] or {"labels": [], "coverage": None}
    return {
        "status": "answered",
        "label": answer["label"],
        "confidence": answer["confidence"],
        "doubt": measure_doubt(answer["probabilities"].values()),
        "verdict": answer["verdict"],
        "reasons": join(reason["code"] for reason in answer["reasons"]),
        "warnings": join(warning["code"] for warning in answer["warnings"]),
        **spread("p_", answer["probabilities"]),
        "set": join(chosen["labels"]),
        "coverage": chosen["coverage"],
        **spread("quality_", answer["quality"]),
        **spread("tta_", answer["tta"]),
        **spread("input_", answer["input"] | {"box": join(answer["input"]["box"])}),
        **spread("model_", answer["model"]),
    }


def measure_doubt(probabilities: Iterable[float]) -> float:
    """From 0 (one class has it all) to 1 (all are equally likely): the entropy, as a share of what it can be."""
    shares = list(probabilities)
    entropy = -sum(share * math.log(share) for share in shares if share > 0)
    return entropy / math.log(len(shares)) if len(shares) > 1 else 0.0


def disarm(cell: Any) -> Any:
    """A spreadsheet runs text that starts like a formula: an apostrophe stops it. Numbers stay numbers."""
    return f"'{cell}" if isinstance(cell, str) and cell.startswith(FORMULA_STARTS) else cell


def prefix(word: str, names: Iterable[str]) -> list[str]:
    return [word + name for name in names]


def spread(word: str, values: Mapping[str, Any] | None) -> dict[str, Any]:
    return {word + name: value for name, value in (values or {}).items()}


def join(words: Iterable[object]) -> str:
    return " ".join(map(str, words))
