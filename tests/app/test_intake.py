import asyncio
import os
import tempfile

import httpx
import pytest
from starlette.requests import ClientDisconnect, Request

from app import intake
from app.intake import (
    EmptyBody,
    MalformedForm,
    StalledUpload,
    TooManyImages,
    Upload,
    WrongContentType,
    WrongField,
    read_image,
    read_images,
)

DATA = bytes(range(256)) * 20 + b"\r\n--almost a boundary\r\n"


def make_request(body: bytes, content_type: str | None, step: int = 10**9, end: str = "http.request") -> Request:
    pieces = [body[start : start + step] for start in range(0, len(body), step)] or [b""]
    messages = [{"type": "http.request", "body": piece, "more_body": True} for piece in pieces]
    messages.append({"type": end, "body": b"", "more_body": False})

    async def receive():
        return messages.pop(0)

    headers = [] if content_type is None else [(b"content-type", content_type.encode())]
    return Request({"type": "http", "method": "POST", "path": "/", "headers": headers}, receive)


def make_form(*parts: tuple[str, str | None, bytes]) -> tuple[bytes, str]:
    request = httpx.Request("POST", "http://test", files=[(field, (name, data)) for field, name, data in parts])
    return request.read(), request.headers["content-type"]


def read(body: bytes, content_type: str | None, **options) -> Upload:
    return asyncio.run(read_image(make_request(body, content_type, **options)))


def read_many(body: bytes, content_type: str | None, limit: int = 64) -> list[Upload]:
    return asyncio.run(read_images(make_request(body, content_type), limit))


@pytest.mark.parametrize(
    "content_type", ["image/png", "image/jpeg; charset=x", "IMAGE/TIFF", "image/*", "application/octet-stream", None]
)
@pytest.mark.parametrize("step", [1000, 10**9])
def test_a_raw_body_is_the_image(content_type, step):
    assert read(DATA, content_type, step=step) == Upload(DATA)


@pytest.mark.parametrize("step", [1, 7, 1000, 10**9])
def test_a_form_in_pieces_of_any_size(step):
    body, content_type = make_form(("file", "tile.png", DATA))
    assert read(body, content_type, step=step) == Upload(DATA, "tile.png")


def test_a_form_field_without_a_file_name_is_an_image_too():
    body = b'--b\r\nContent-Disposition: form-data; name="file"\r\n\r\nxyz\r\n--b--\r\n'
    assert read(body, "multipart/form-data; boundary=b") == Upload(b"xyz", None)


def test_many_files_keep_their_order_and_names():
    body, content_type = make_form(*(("files", f"Größe {n}.png", bytes([n]) * n) for n in range(5)))
    assert read_many(body, content_type) == [Upload(bytes([n]) * n, f"Größe {n}.png") for n in range(5)]


def test_nothing_at_all():
    for body, content_type in ((b"", None), (b"", "image/png"), make_form(("file", "x.png", b""))):
        with pytest.raises(EmptyBody, match="'file'"):
            read(body, content_type)


def test_a_form_without_parts():
    with pytest.raises(EmptyBody, match="expected the field 'file'"):
        read(b"--b--\r\n", "multipart/form-data; boundary=b")


@pytest.mark.parametrize(
    ("content_type", "text"),
    [
        ("application/x-www-form-urlencoded", "curl sends unless told otherwise.*'Content-Type: image/png'"),
        ("application/json", "application/json.*image/tiff"),
        ("application/octet-streams", "application/octet-streams"),
        ("text/plain", "the field 'file'"),
    ],
)
def test_other_content_types_are_told_the_right_header(content_type, text):
    with pytest.raises(WrongContentType, match=text):
        read(DATA, content_type)


def test_a_raw_body_is_no_batch():
    with pytest.raises(WrongContentType, match=r"'files'.*use /predict"):
        read_many(DATA, "image/png")


@pytest.mark.parametrize("field", ["image", "files", "mpp", ""])
def test_a_wrong_field_name_is_told_the_right_one(field):
    with pytest.raises(WrongField, match="expected only 'file'"):
        read(*make_form((field, "x.png", DATA)))


def test_an_option_in_the_form_is_no_second_image():
    with pytest.raises(WrongField, match=r"field 'mpp'.* options go into the query string"):
        read(*make_form(("file", "x.png", DATA), ("mpp", None, b"0.495")))


def test_more_images_than_allowed_are_refused_before_they_are_kept():
    body, content_type = make_form(*[("files", "x", b"data")] * 5)
    with pytest.raises(TooManyImages, match="more than 4"):
        read_many(body, content_type, limit=4)
    with pytest.raises(TooManyImages, match="/predict/batch"):
        read(*make_form(("file", "a", b"x"), ("file", "b", b"y")))


def test_forms_that_are_none():
    body, content_type = make_form(("file", "x.png", DATA))
    for broken, its_type in (
        (body, "multipart/form-data"),
        (body[:-10], content_type),
        (body[:60], content_type),
        (b"no form", content_type),
        (body, "multipart/form-data; boundary=" + "b" * 500),
    ):
        with pytest.raises(MalformedForm):
            read(broken, its_type)


def test_data_full_of_the_boundary_is_refused():
    body = b'--b\r\nContent-Disposition: form-data; name="file"\r\n\r\n' + b"\r\n--bx" * 10_000 + b"\r\n--b--\r\n"
    with pytest.raises(MalformedForm, match="boundary occurs in its data"):
        read(body, "multipart/form-data; boundary=b", step=1000)


def test_a_client_that_leaves_in_the_middle():
    with pytest.raises(ClientDisconnect):
        read(DATA, "image/png", end="http.disconnect")


@pytest.mark.anyio
@pytest.mark.parametrize("drips", [False, True])
async def test_a_client_that_stops_sending_or_never_ends(monkeypatch, drips):
    monkeypatch.setattr(intake, "UPLOAD_S" if drips else "STALL_S", 0.01)

    async def receive():
        await asyncio.Event().wait() if not drips else await asyncio.sleep(0)
        return {"type": "http.request", "body": b"x", "more_body": True}

    headers = [(b"content-type", b"image/png")]
    request = Request({"type": "http", "method": "POST", "path": "/", "headers": headers}, receive)
    with pytest.raises(StalledUpload, match="has not ended" if drips else "stood still"):
        await read_image(request)


def test_large_files_never_touch_the_disk(monkeypatch):
    def refuse(*args, **options):
        raise AssertionError("a file was opened")

    monkeypatch.setattr(tempfile, "TemporaryFile", refuse)
    monkeypatch.setattr(os, "open", refuse)
    body, content_type = make_form(("file", "x.png", b"x" * (5 << 20)))
    assert len(read(body, content_type, step=1 << 16).data) == 5 << 20
