"""Request in, image bytes out: a raw body, or the files of a multipart form.

Everything stays in memory. Starlette's own form parser writes files above 1 MiB to disk, where a patient's picture
has no business, so the parts are gathered here from the same push parser. How large a body may be is the
middleware's affair; nothing here reads ahead of it.
"""

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header
from starlette.requests import ClientDisconnect, Request

if TYPE_CHECKING:  # the name exists for type checkers only
    from python_multipart.multipart import MultipartCallbacks

ANY_BYTES = "application/octet-stream"  # what HTTP libraries call bytes, where they call them anything
ACCEPTED_TYPES = ("image/png", "image/jpeg", "image/tiff", "image/webp", "image/bmp", ANY_BYTES)
STALL_S = 30  # a client that sends nothing for this long has lost its connection, or means harm
MOST_DELIMITERS = 512  # of a form; those of the most images that are taken are far fewer
UPLOAD_S = 300  # the largest body at 1 Mbit/s; one that drips would otherwise hold its memory for days


class EmptyBody(ValueError):
    pass


class WrongField(ValueError):
    pass


class WrongContentType(ValueError):
    pass


class MalformedForm(ValueError):
    pass


class TooManyImages(ValueError):
    pass


class StalledUpload(TimeoutError):
    pass


@dataclass(frozen=True, slots=True)
class Upload:
    data: bytes
    name: str | None = None  # as the client calls it; goes back to the client and nowhere else


async def read_image(request: Request) -> Upload:
    """The one image of a request: its raw body, or the form field `file`."""
    content_type = request.headers.get("content-type", "")
    if not content_type or is_image(content_type):
        upload = Upload(b"".join([chunk async for chunk in read_chunks(request)]))
    elif is_form(content_type):
        upload = (await read_form(request, content_type, field="file", limit=1))[0]
    else:
        raise WrongContentType(explain_content_type(content_type))
    if not upload.data:
        raise EmptyBody("the image is empty: 0 bytes came. Send the file's bytes as body or as form field 'file'")
    return upload


async def read_images(request: Request, limit: int) -> list[Upload]:
    """All files of the form field `files`, in order; an empty one is for whoever decodes it to complain about."""
    content_type = request.headers.get("content-type", "")
    if not is_form(content_type):
        raise WrongContentType(
            f"the content type is {content_type or 'missing'}, expected multipart/form-data with one or more fields "
            "'files'; for a single raw image use /predict"
        )
    return await read_form(request, content_type, field="files", limit=limit)


def is_image(content_type: str) -> bool:
    kind = content_type.partition(";")[0].strip().lower()
    return kind.startswith("image/") or kind == ANY_BYTES


def is_form(content_type: str) -> bool:
    return content_type.lower().startswith("multipart/form-data")


def explain_content_type(content_type: str) -> str:
    curl = " (what curl sends unless told otherwise)" if "urlencoded" in content_type else ""
    return (
        f"the content type is {content_type}{curl}; send the header 'Content-Type: image/png' "
        f"(or another of {', '.join(ACCEPTED_TYPES)}) with the raw bytes, or a multipart form with the field 'file'"
    )


async def read_chunks(request: Request) -> AsyncIterator[bytes]:
    ends_at = asyncio.get_running_loop().time() + UPLOAD_S
    more = True
    while more:
        waits_until = min(asyncio.get_running_loop().time() + STALL_S, ends_at)
        try:
            async with asyncio.timeout_at(waits_until):
                message = await request.receive()
        except TimeoutError:
            reason = f"has not ended after {UPLOAD_S} s" if waits_until == ends_at else f"stood still for {STALL_S} s"
            raise StalledUpload(f"the body {reason}") from None
        if message["type"] == "http.disconnect":
            raise ClientDisconnect
        yield message.get("body", b"")
        more = message.get("more_body", False)


async def read_form(request: Request, content_type: str, *, field: str, limit: int) -> list[Upload]:
    boundary = parse_options_header(content_type)[1].get(b"boundary")
    if not boundary:
        raise MalformedForm(
            "the content type multipart/form-data lacks its boundary; let the HTTP library set the header"
        )
    form = _Form(field, limit)
    delimiter, delimiters = b"\r\n--" + boundary, 0
    try:
        parser = MultipartParser(boundary, form.callbacks())
        async for chunk in read_chunks(request):
            # Of what looks like one and goes on otherwise the parser reads byte by byte: a second a MiB.
            delimiters += chunk.count(delimiter)
            if delimiters > MOST_DELIMITERS:
                raise MalformedForm("the form's boundary occurs in its data; let the HTTP library choose it")
            if chunk:
                parser.write(chunk)
    except FormParserError as error:
        raise MalformedForm(f"the body is not a multipart form: {error}") from error
    if not form.ended:
        raise MalformedForm("the multipart form ends before its closing boundary")
    if not form.uploads:
        raise EmptyBody(f"the form holds no image; expected the field '{field}'")
    return form.uploads


class _Form:
    """Gathers the parts of a form as the parser finds them; only image fields of the one right name are taken."""

    def __init__(self, field: str, limit: int) -> None:
        self.uploads: list[Upload] = []
        self.ended = False
        self._field = field
        self._limit = limit
        self._header = bytearray()
        self._value = bytearray()
        self._disposition = b""
        self._name: str | None = None
        self._data = bytearray()

    def callbacks(self) -> "MultipartCallbacks":
        return {
            "on_part_begin": self.on_part_begin,
            "on_header_field": self.on_header_field,
            "on_header_value": self.on_header_value,
            "on_header_end": self.on_header_end,
            "on_headers_finished": self.on_headers_finished,
            "on_part_data": self.on_part_data,
            "on_part_end": self.on_part_end,
            "on_end": self.on_end,
        }

    def on_part_begin(self) -> None:
        self._disposition = b""
        self._data = bytearray()

    def on_header_field(self, data: bytes, start: int, end: int) -> None:
        self._header += data[start:end]

    def on_header_value(self, data: bytes, start: int, end: int) -> None:
        self._value += data[start:end]

    def on_header_end(self) -> None:
        if self._header.lower() == b"content-disposition":
            self._disposition = bytes(self._value)
        self._header.clear()
        self._value.clear()

    def on_headers_finished(self) -> None:
        _, options = parse_options_header(self._disposition)
        name = options.get(b"name", b"").decode("utf-8", "replace")
        if name != self._field:
            raise WrongField(
                f"the form has a field '{name[:40]}', expected only '{self._field}'; options go into the query string"
            )
        if len(self.uploads) == self._limit:
            single = " /predict/batch takes many, as fields 'files'" if self._limit == 1 else ""
            raise TooManyImages(f"more than {self._limit} came in one request.{single}")
        filename = options.get(b"filename")
        self._name = filename.decode("utf-8", "replace") if filename is not None else None

    def on_part_data(self, data: bytes, start: int, end: int) -> None:
        self._data += data[start:end]

    def on_part_end(self) -> None:
        self.uploads.append(Upload(bytes(self._data), self._name))

    def on_end(self) -> None:
        self.ended = True
