"""The service seen from its client: one that runs elsewhere, or one inside this process without a socket.

Both answer on the same routes, so a picture gets the same answer whether a server runs or not.
"""

import asyncio
import io
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from numpy.typing import NDArray

from app.main import create_app
from app.settings import Settings

SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".tif", ".tiff", ".webp", ".bmp"})
IN_FLIGHT = 8  # pictures under way at a time: enough for decoding and inference to overlap
TIMEOUT_S = 120  # the service has a deadline of its own, this one is for lost connections
PATIENCE_MS = 600_000
MOST_TRIES = 5
LONGEST_WAIT_S = 60  # as the service never asks for more; whoever does is given up


class Unanswered(RuntimeError):
    """The service refused, or there is none. Its problem (RFC 9457) has a `detail` to read, a `code` for programs."""

    def __init__(self, problem: dict[str, Any]) -> None:
        super().__init__(problem["detail"])
        self.problem = problem


@asynccontextmanager
async def connect(url: str, api_key: str | None) -> AsyncIterator[httpx.AsyncClient]:
    if api_key and not api_key.isprintable():
        raise Unanswered(_problem("the key isn't UTF-8, or holds what no header can carry, as a line break"))
    headers = [(b"X-API-Key", api_key.strip().encode())] if api_key else []  # as text httpx refuses beyond ASCII
    try:
        address = httpx.URL(url)
        if address.scheme not in ("http", "https") or not address.host or not 0 < (address.port or 80) < 1 << 16:
            raise httpx.InvalidURL("scheme, host or port is missing or wrong")
        client = httpx.AsyncClient(base_url=address, headers=headers, timeout=TIMEOUT_S)
    except (httpx.InvalidURL, UnicodeError) as error:
        raise Unanswered(_problem(f"{url} is no address ({error}); give one such as http://127.0.0.1:8000")) from None
    async with client:
        yield client


@asynccontextmanager
async def open_here(settings: Settings) -> AsyncIterator[httpx.AsyncClient]:
    """The whole service in this process, for its one user: no keys, no haste."""
    app = create_app(settings.model_copy(update={"api_keys": (), "api_keys_file": None, "deadline_ms": PATIENCE_MS}))
    transport = httpx.ASGITransport(app)
    async with (
        app.router.lifespan_context(app),
        httpx.AsyncClient(base_url="http://here", transport=transport, timeout=None) as client,
    ):
        yield client


async def ask_model(client: httpx.AsyncClient) -> dict[str, Any]:
    """The model's card; the first request, which tells whether anybody answers."""
    return _read_object(await _request(client, "GET", "/model"))


async def ask(client: httpx.AsyncClient, route: str, picture: Path, query: dict[str, Any]) -> httpx.Response:
    asked = {name: value for name, value in query.items() if value is not None}
    headers = {"Content-Type": "image/*"}  # the service looks at the bytes
    return await _request(client, "POST", route, content=_read(picture), params=asked, headers=headers)


async def ask_all(
    client: httpx.AsyncClient,
    pictures: list[Path],
    query: dict[str, Any],
    when_done: Callable[[], None],
) -> list[dict[str, Any]]:
    """For each picture, in order, `file` and its prediction or its `error`, as /predict/batch has them."""
    places = asyncio.Semaphore(IN_FLIGHT)

    async def predict(picture: Path) -> dict[str, Any]:
        async with places:
            try:
                answer = _read_object(await ask(client, "/predict", picture, query))
            except Unanswered as error:
                answer = {"error": error.problem}
            when_done()
            return {"file": str(picture), **answer}

    return await asyncio.gather(*map(predict, pictures))


async def ask_features(client: httpx.AsyncClient, pictures: list[Path], mpp: object, width: int) -> NDArray[np.float32]:
    """A row for each picture, in order; not a number throughout where one can't be answered."""
    places = asyncio.Semaphore(IN_FLIGHT)

    async def read(picture: Path) -> NDArray[np.float32]:
        async with places:
            try:
                data = (await ask(client, "/features", picture, {"mpp": mpp, "format": "npy"})).content
            except Unanswered:
                return np.full(width, np.nan, np.float32)
            row: NDArray[np.float32] = np.load(io.BytesIO(data))
            return row

    return np.stack(await asyncio.gather(*map(read, pictures)))


def _read(picture: Path) -> bytes:
    try:
        return picture.read_bytes()
    except IsADirectoryError:
        reason = f"the folder holds no picture ({', '.join(sorted(SUFFIXES))})"
    except OSError as error:
        reason = f"the file can't be read: {error.strerror}"
    raise Unanswered({"code": "unreadable_file", "title": "The file can't be read", "detail": reason})


async def _request(client: httpx.AsyncClient, method: str, route: str, **content: Any) -> httpx.Response:
    for tries_left in reversed(range(MOST_TRIES)):
        try:
            response = await client.request(method, route, **content)
        except httpx.HTTPError as error:
            cause = str(error) or type(error).__name__
            reason = f"nobody answers at {client.base_url} ({cause}); start a service there with `tissue serve`"
            raise Unanswered(_problem(reason)) from None
        wait_s = _retry_after_s(response)
        if response.status_code != 503 or not tries_left or wait_s > LONGEST_WAIT_S:
            break
        await asyncio.sleep(wait_s)
    if response.is_success:
        return response
    raise Unanswered(_read_problem(response))


def _retry_after_s(response: httpx.Response) -> int:
    """In seconds; a proxy may answer with a date or without a word."""
    wait = response.headers.get("Retry-After", "")
    return int(wait) if wait.isascii() and wait.isdigit() else 1


def _read_problem(response: httpx.Response) -> dict[str, Any]:
    if response.headers.get("Content-Type") == "application/problem+json":
        problem = _read_object(response)
        if "detail" in problem:
            return problem
    reason = f"{response.url} answered {response.status_code} {response.reason_phrase}: is it a tissue service?"
    return _problem(reason, "Something else answers there")


def _read_object(response: httpx.Response) -> dict[str, Any]:
    try:
        document = response.json()
    except ValueError:
        document = None
    if not isinstance(document, dict):
        reason = f"{response.url} answered what is no JSON object: is it a tissue service?"
        raise Unanswered(_problem(reason, "Something else answers there"))
    return document


def _problem(reason: str, title: str = "There is no service") -> dict[str, Any]:
    return {"code": "no_service", "title": title, "detail": reason}
