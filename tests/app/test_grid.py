import io

import numpy as np
import pytest
from PIL import Image

from app.export import Answer
from app.grid import cut_field, read_field, to_geojson
from model.pixels import FieldTooSmall, ImageRefused, ImageTooSmall, MppOutOfRange
from tests.app.conftest import encode
from training.synthetic import draw_tile

FIELD = draw_tile("Stroma", 1, 330)


@pytest.mark.parametrize(("mpp", "side"), [(0.495, 150), (0.4951, 150), (0.25, 297), (0.5, 149), (1, 75)])
def test_boxes_lie_side_by_side_and_hold_what_the_field_holds(mpp, side):
    tiles = list(cut_field(read_field(encode(FIELD), 150, 0.495, mpp)))
    assert len(tiles) == (330 // side) ** 2
    seen = np.zeros(FIELD.shape[:2], int)
    for (x, y, width, height), png in tiles:
        assert (width, height) == (side, side)
        seen[y : y + height, x : x + width] += 1
        with Image.open(io.BytesIO(png)) as tile:
            assert np.array_equal(np.asarray(tile), FIELD[y : y + height, x : x + width])
    whole = 330 // side * side
    assert (seen[:whole, :whole] == 1).all() and seen.sum() == whole**2


def test_a_field_is_upright():
    turned = Image.Exif()
    turned[0x0112] = 6  # a quarter turn clockwise makes it upright
    data = encode(FIELD[:160], "JPEG", exif=turned)
    assert [box[:2] for box, _ in cut_field(read_field(data, 150, 0.495, 0.495))] == [(0, 0), (0, 150)]


@pytest.mark.parametrize(
    ("mpp", "refusal"), [(None, ImageRefused), (0.2, FieldTooSmall), (3, ImageTooSmall), (9, MppOutOfRange)]
)
def test_what_has_no_tiles_is_refused(mpp, refusal):
    with pytest.raises(refusal, match=r"mpp|um per pixel"):
        read_field(encode(FIELD), 150, 0.495, mpp)


def test_what_is_out_of_scope_has_no_class_and_what_failed_no_polygon():
    box = {"x": 0, "y": 0, "width": 150, "height": 150}
    judged = {"box": box, "label": "Debris", "confidence": 0.9, "probabilities": {"Debris": 0.9, "Stroma": 0.1}}
    answers: list[Answer] = [
        judged | {"verdict": "out_of_scope"},
        {"box": box, "error": {}},
        judged | {"verdict": "uncertain"},
    ]
    glass, tissue = (feature["properties"] for feature in to_geojson(answers, {"Debris": "#0a0b0c"})["features"])
    assert "classification" not in glass and glass["metadata"] == {"verdict": "out_of_scope"}
    assert tissue["classification"] == {"name": "Debris", "color": [10, 11, 12]}
    assert glass["measurements"] == {"confidence": 0.9, "p_Debris": 0.9, "p_Stroma": 0.1}
