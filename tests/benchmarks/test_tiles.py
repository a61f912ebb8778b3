import io

import pytest
from PIL import Image

from benchmarks.tiles import COUNT, cut_short, load_tiles, mean_bytes
from model.pixels import UndecodableImage, decode


def test_drawn_tiles_are_files_of_the_form_asked_for():
    tiles = load_tiles("jpeg", side_px=48)
    assert len(tiles) == COUNT
    assert {decode(tile.data).format for tile in tiles} == {"JPEG"}
    assert {tile.content_type for tile in tiles} == {"image/jpeg"}


def test_a_folder_of_any_pictures_takes_their_place(tmp_path):
    Image.new("RGB", (40, 50), "purple").save(tmp_path / "one.tif")
    (tile,) = load_tiles("png", tmp_path)
    assert Image.open(io.BytesIO(tile.data)).size == (40, 50)
    assert mean_bytes([tile, tile]) == len(tile.data)


def test_a_folder_without_pictures_is_refused(tmp_path):
    with pytest.raises(ValueError, match="holds no picture"):
        load_tiles("png", tmp_path)


@pytest.mark.parametrize("form", ["jpeg", "png"])
def test_a_tile_cut_short_cannot_be_decoded(form):
    with pytest.raises(UndecodableImage):
        decode(cut_short(load_tiles(form, side_px=48)[0]).data)
