import re

import pytest

from app import schemas
from app.export import flatten, list_columns, measure_doubt
from tests.app.test_web import WEB


def test_the_page_saves_the_same_columns():
    listed = re.search(r"const COLUMNS = \[\n(.*?)\n\];", (WEB / "page" / "export.js").read_text(), re.DOTALL)
    assert listed and re.findall(r'"(\w+)"', listed[1]) == list_columns([""])


def test_an_answer_fills_the_columns_that_there_are(client, png):
    answer = client.post_image("/predict?tta=true&mpp=0.495", png).json()
    cells = flatten({"file": "a.png", **answer})
    columns = list_columns(answer["probabilities"])
    assert set(columns) - set(cells) == {"request_id", "error_code", "error"}
    assert [column for column in columns if column in cells] == list(cells)
    assert cells["input_box"] == "0 0 150 150" and cells["tta_views"] == 8
    assert cells["model_digest"] == answer["model"]["digest"]


def test_a_failure_says_why(client):
    problem = client.post_image("/predict", b"no image").json()
    cells = flatten({"file": "a.png", "error": problem})
    assert (cells["status"], cells["error_code"]) == ("failed", "unsupported_format")
    assert cells["error"] == f"{problem['title']}: {problem['detail']}"
    assert set(cells) <= set(list_columns([]))


@pytest.mark.parametrize("name", ["=1+1.png", "+a.png", "-a.png", "@a.png", "\ta.png"])
def test_no_text_is_a_formula(name):
    cells = flatten({"file": name, "error": {"detail": name}})
    assert cells["file"] == f"'{name}"


def test_doubt_goes_from_none_to_all():
    assert measure_doubt([1.0, 0.0, 0.0]) == 0
    assert measure_doubt([0.25] * 4) == pytest.approx(1)
    assert measure_doubt([1.0]) == 0


def test_no_column_stands_for_two_things():
    names = [*schemas.Prediction.model_fields, "error", "file"]  # as classes might be called
    columns = list_columns(names, ("x", "y"))
    assert len(set(columns)) == len(columns)
