"""The service seen from its client: one that runs elsewhere, or one inside this process without a socket.

Both answer on the same routes, so a picture gets the same answer whether a server runs or not.
"""

import asyncio
import glob
import sys
from collections import deque
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

import httpx
import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, Field, ValidationError

from app.errors import find_kind
from app.export import Answer
from app.grid import Field as GridField
from app.grid import cut_field, read_field
from app.main import create_app
from app.schemas import Features, ModelClass, Prediction, Problem
from app.settings import Settings
from model.artifact import CLASS_NAME, COLOR
from model.pixels import EmptyImage, ImageRefused

Document = TypeVar("Document", bound=BaseModel)

SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".tif", ".tiff", ".webp", ".bmp"})
STDIN = Path("-")
IN_FLIGHT = 8  # pictures under way at a time: enough for decoding and inference to overlap
TIMEOUT_S = 120  # the service has a deadline of its own, this one is for lost connections
PATIENCE_MS = 600_000
LARGEST_BODY_MIB = 4096  # the most that the setting allows: here the number of pixels is limit enough
MOST_TRIES = 5
LONGEST_WAIT_S = 60  # the service never asks for more; whoever does is given up
# The largest are a picture and the numbers of every head: under 10 MiB for 24 layers of 16 heads and 32 x 32 patches.
LARGEST_ANSWER_BYTES = 16 << 20
WRONG_OPTION = frozenset(
    {
        *("invalid_parameter", "coverage_unavailable", "mpp_out_of_range"),
        *("unknown_target", "method_unavailable", "layer_out_of_range", "unsuitable_options"),
    }
)
WRONG_FOR_ALL = WRONG_OPTION | {"unauthorized"}


class KnownClass(ModelClass):
    """As the manifest of an artefact has them."""

    name: str = Field(pattern=CLASS_NAME)
    color: str = Field(pattern=COLOR)


class Card(BaseModel):
    """What is needed of the model's card."""

    classes: list[KnownClass]
    tile_px: int = Field(gt=0, le=2048)
    tile_mpp: float = Field(gt=0, allow_inf_nan=False)
    feature_width: int = Field(gt=0, le=1 << 16)  # of every picture that many numbers are kept


class Unanswered(RuntimeError):
    """The service refused, or there is none. Its problem (RFC 9457) has a `detail` to read, a `code` for programs."""

    def __init__(self, problem: dict[str, Any]) -> None:
        super().__init__(problem["detail"])
        self.problem = problem


@asynccontextmanager
async def connect(url: str, api_key: str | None) -> AsyncIterator[httpx.AsyncClient]:
    if api_key and not api_key.isprintable():
        raise Unanswered(write_problem("the key isn't UTF-8, or holds what no header can carry, as a line break"))
    headers = [(b"Accept-Encoding", b"identity")]  # what is packed may unpack to anything
    if api_key:
        headers.append((b"X-API-Key", api_key.strip().encode()))  # as text httpx refuses beyond ASCII
    try:
        address = httpx.URL(url)
        if address.scheme not in ("http", "https") or not address.host or not 0 < (address.port or 80) < 1 << 16:
            raise httpx.InvalidURL("scheme, host or port is missing or wrong")
        client = httpx.AsyncClient(base_url=address, headers=headers, timeout=TIMEOUT_S)
    except (httpx.InvalidURL, UnicodeError) as error:
        raise Unanswered(
            write_problem(f"{url} is no address ({error}); give one such as http://127.0.0.1:8000")
        ) from None
    async with client:
        yield client


@asynccontextmanager
async def open_here(settings: Settings) -> AsyncIterator[httpx.AsyncClient]:
    """The whole service in this process, for its one user: no keys, no haste, no body that is too long."""
    ours = {"api_keys": (), "api_keys_file": None, "deadline_ms": PATIENCE_MS, "max_body_mib": LARGEST_BODY_MIB}
    app = create_app(settings.model_copy(update=ours))
    transport = httpx.ASGITransport(app)
    async with (
        app.router.lifespan_context(app),
        httpx.AsyncClient(base_url="http://here", transport=transport, timeout=None) as client,
    ):
        yield client


async def ask_model(client: httpx.AsyncClient) -> Card:
    """The first request, which tells whether anybody answers."""
    response = await send_request(client, "GET", "/model")
    return read_document(response, Card, "what is no model's card")


async def ask(client: httpx.AsyncClient, route: str, picture: Path | bytes, query: dict[str, Any]) -> httpx.Response:
    data = picture if isinstance(picture, bytes) else read_picture(picture)
    asked = {name: value for name, value in query.items() if value is not None}
    headers = {"Content-Type": "image/*"}  # the service looks at the bytes
    return await send_request(client, "POST", route, content=data, params=asked, headers=headers)


def ask_all(client: httpx.AsyncClient, pictures: Iterable[Path], query: dict[str, Any]) -> AsyncIterator[Answer]:
    """For each picture, in order, `file` and its prediction or its `error`, as /predict/batch has them."""
    return ask_in_order(client, (({"file": str(picture)}, picture) for picture in pictures), query)


async def ask_grid(
    client: httpx.AsyncClient, pictures: Iterable[Path], query: dict[str, Any], card: Card
) -> AsyncIterator[Answer]:
    """For each picture, in order, what `ask_all` gives for each of its tiles, with the tile's `box`; or one `error`."""
    for picture in pictures:
        file = {"file": str(picture)}
        try:
            field = open_field(picture, query["mpp"], card)
        except Unanswered as error:
            yield file | excuse(error)
            continue
        tiles = ((file | {"box": place._asdict()}, data) for place, data in cut_field(field))
        notes = [asdict(note) for note in field.notes]
        async for answer in ask_in_order(client, tiles, query | {"mpp": field.mpp}):
            if "error" not in answer:
                answer["input"] |= field.origin
                answer["warnings"] = notes + [one for one in answer["warnings"] if one not in notes]
            yield answer


async def ask_in_order(
    client: httpx.AsyncClient, named: Iterable[tuple[Answer, Path | bytes]], query: dict[str, Any]
) -> AsyncIterator[Answer]:
    """A few under way at a time; an answer comes as soon as it and those before it are there."""

    async def predict(name: Answer, picture: Path | bytes) -> Answer:
        try:
            response = await ask(client, "/predict", picture, query)
            return name | dump(read_document(response, Prediction, "what is no prediction"))
        except Unanswered as error:
            return name | excuse(error)

    under_way: deque[asyncio.Task[Answer]] = deque()
    try:
        for name, picture in named:
            under_way.append(asyncio.create_task(predict(name, picture)))
            if len(under_way) == IN_FLIGHT:
                yield await under_way.popleft()
        while under_way:
            yield await under_way.popleft()
    finally:
        for task in under_way:
            task.cancel()
        await asyncio.gather(*under_way, return_exceptions=True)


async def ask_features(
    client: httpx.AsyncClient, pictures: list[Path], mpp: object, width: int
) -> tuple[NDArray[np.float32], dict[str, str]]:
    """A row for each picture, in order, of NaN where there are no features; and why there are none, by file."""
    places = asyncio.Semaphore(IN_FLIGHT)
    rows, missing = np.full((len(pictures), width), np.nan, np.float32), {}

    async def read(n: int, picture: Path) -> None:
        async with places:
            try:
                rows[n] = read_row(await ask(client, "/features", picture, {"mpp": mpp, "format": "json"}), width)
            except Unanswered as error:
                missing[str(picture)] = error.problem["detail"]

    await asyncio.gather(*(read(n, picture) for n, picture in enumerate(pictures)))
    return rows, missing


def read_row(response: httpx.Response, width: int) -> list[float]:
    row = read_document(response, Features, "what are no features").features
    if len(row) != width:
        raise Unanswered(suspect(response, f"{len(row)} features, where its model has {width}"))
    return row


def excuse(error: Unanswered) -> Answer:
    """The problem of one picture; one that all would have ends everything."""
    if error.problem.get("code") in WRONG_FOR_ALL:
        raise error
    return {"error": error.problem}


def open_field(picture: Path, mpp: float | None, card: Card) -> GridField:
    try:
        return read_field(read_picture(picture), card.tile_px, card.tile_mpp, mpp)
    except ImageRefused as error:
        raise Unanswered(describe_refusal(error)) from None


def read_picture(picture: Path) -> bytes:
    try:
        data = sys.stdin.buffer.read() if picture == STDIN else picture.read_bytes()
    except OSError as error:
        reason = explain_unreadable(picture, error)
        raise Unanswered({"code": "unreadable_file", "title": "The file can't be read", "detail": reason}) from None
    if not data:
        raise Unanswered(describe_refusal(EmptyImage("the file is empty")))
    return data


def explain_unreadable(picture: Path, error: OSError) -> str:
    if isinstance(error, IsADirectoryError):
        return f"the folder holds no picture ({', '.join(sorted(SUFFIXES))})"
    if isinstance(error, FileNotFoundError) and glob.has_magic(str(picture)):
        return f"the pattern matches nothing that is a picture ({', '.join(sorted(SUFFIXES))})"
    return f"the file can't be read: {error.strerror}"


def describe_refusal(error: ImageRefused) -> dict[str, Any]:
    return find_kind(error).problem(str(error)).model_dump(exclude_none=True)


async def send_request(client: httpx.AsyncClient, method: str, route: str, **content: Any) -> httpx.Response:
    for tries_left in reversed(range(MOST_TRIES)):
        try:
            response = await receive(client, method, route, **content)
        except httpx.HTTPError as error:
            cause = str(error) or type(error).__name__
            reason = f"nobody answers at {client.base_url} ({cause}); start a service there with `tissue serve`"
            raise Unanswered(write_problem(reason)) from None
        if (task := asyncio.current_task()) and task.cancelling():
            raise asyncio.CancelledError  # a service in this process has answered the cancellation with 503
        wait_s = retry_after_s(response)
        if response.status_code != 503 or not tries_left or wait_s > LONGEST_WAIT_S:
            break
        await asyncio.sleep(wait_s)
    if response.is_success:
        return response
    raise Unanswered(read_problem(response))


async def receive(client: httpx.AsyncClient, method: str, route: str, **content: Any) -> httpx.Response:
    """The whole answer, unless it has no end."""
    async with client.stream(method, route, **content) as response:
        if response.headers.get("Content-Encoding", "identity") != "identity":
            raise Unanswered(suspect(response, "in an encoding that wasn't asked for"))
        body = bytearray()
        async for piece in response.aiter_bytes():
            body += piece
            if len(body) > LARGEST_ANSWER_BYTES:
                raise Unanswered(suspect(response, f"over {LARGEST_ANSWER_BYTES >> 20} MiB"))
    return httpx.Response(response.status_code, headers=response.headers, content=bytes(body), request=response.request)


def retry_after_s(response: httpx.Response) -> float:
    """In seconds, of any number of digits; a proxy may answer with a date or without a word."""
    wait = response.headers.get("Retry-After", "")
    return float(wait) if wait.isascii() and wait.isdigit() else 1


def read_problem(response: httpx.Response) -> dict[str, Any]:
    came = f"{response.status_code} {response.reason_phrase}"
    if response.headers.get("Content-Type") == "application/problem+json":
        return dump(read_document(response, Problem, came))
    return suspect(response, came)


def read_document(response: httpx.Response, model: type[Document], otherwise: str) -> Document:
    """Strictly, as what is read is counted with and printed."""
    try:
        return model.model_validate_json(response.content, strict=True)
    except ValidationError:
        raise Unanswered(suspect(response, otherwise)) from None


def dump(document: BaseModel) -> dict[str, Any]:
    """What came of the document's fields. Whatever else came could pass for what is noted of the picture here."""
    return document.model_dump(mode="json", exclude_unset=True)


def suspect(response: httpx.Response, came: str) -> dict[str, Any]:
    return write_problem(f"{response.url} answered {came}: is it a tissue service?", "Something else answers there")


def write_problem(reason: str, title: str = "There is no service") -> dict[str, Any]:
    return {"code": "no_service", "title": title, "detail": reason}
