import asyncio

import pytest

from app.middleware import LARGEST_AT_ONCE, BodyLimit, TooManyUploads
from app.samples import SMALL_BYTES
from tests.app.conftest import open_client

GUARDED = [("POST", "/predict"), ("POST", "/predict/batch"), ("POST", "/attention"), ("POST", "/features")]
GUARDED += [("GET", "/model"), ("GET", "/metrics")]
OPEN = ["/", "/docs", "/redoc", "/openapi.json", "/healthz", "/readyz", "/static/docs.js"]


@pytest.fixture(scope="module")
def locked(tiny_artifact):
    with open_client(
        artifact=tiny_artifact, api_keys=("first", "zweiter-schlüssel", "voilà"), cors_origins=("https://a.example",)
    ) as c:
        yield c


@pytest.mark.parametrize("key", ["zweiter-schlüssel", "voilà"])  # the latter's last byte in UTF-8: a space in Latin-1
@pytest.mark.parametrize("encoding", ["utf-8", "latin-1"])
def test_a_key_beyond_ascii_opens_however_the_client_encodes_it(locked, encoding, key):
    key = key.encode(encoding)
    for headers in ({"X-API-Key": key}, {"Authorization": b"Bearer " + key}):
        assert locked.get("/model", headers=headers).status_code == 200


@pytest.mark.parametrize(("method", "path"), GUARDED)
def test_guarded_routes_need_a_key(locked, method, path):
    for headers in ({}, {"X-API-Key": "wrong"}, {"Authorization": "Bearer firs"}, {"Authorization": "Basic first"}):
        response = locked.request(method, path, headers=headers)
        assert response.status_code == 401
        assert response.json()["code"] == "unauthorized"
        assert response.headers["www-authenticate"] == "Bearer"
    for headers in ({"X-API-Key": "first"}, {"Authorization": "Bearer first"}, {"Authorization": "bearer  first"}):
        assert locked.request(method, path, headers=headers).status_code != 401


@pytest.mark.parametrize("path", OPEN)
def test_open_routes_need_none(locked, path):
    assert locked.get(path).status_code == 200


def test_without_keys_all_is_open(client):
    assert client.get("/model").status_code == 200


def test_an_empty_key_opens_nothing_and_a_wrong_one_is_told_from_none(locked):
    for headers in ({}, {"X-API-Key": ""}, {"X-API-Key": " "}, {"Authorization": "Bearer"}):
        assert locked.get("/model", headers=headers).json()["detail"].startswith("this route needs a key")
    wrong = locked.get("/model", headers={"X-API-Key": "wrong"}).json()
    assert wrong["detail"].startswith("the key that came is none of this service's")


def test_who_has_no_key_is_counted_by_route(locked):
    locked.post("/predict/batch")
    locked.post("/predict/badge")
    text = locked.get("/metrics", headers={"X-API-Key": "first"}).text
    assert 'method="POST",route="/predict/batch",status="401"' in text
    assert "badge" not in text


def test_cors_is_off_unless_set(client, locked):
    headers = {"Origin": "https://a.example"}
    assert "access-control-allow-origin" not in client.get("/healthz", headers=headers).headers
    assert locked.get("/healthz", headers=headers).headers["access-control-allow-origin"] == "https://a.example"
    other = locked.get("/healthz", headers={"Origin": "https://b.example"})
    assert "access-control-allow-origin" not in other.headers


def test_a_preflight_needs_no_key(locked):
    headers = {
        "Origin": "https://a.example",
        "Access-Control-Request-Method": "POST",
        "Access-Control-Request-Headers": "x-api-key",
    }
    assert locked.request("OPTIONS", "/predict", headers=headers).status_code == 200


def test_a_sane_request_id_is_kept_and_another_replaced(client):
    assert client.get("/healthz", headers={"X-Request-ID": "abc-1"}).headers["x-request-id"] == "abc-1"
    made = {
        client.get("/healthz", headers={"X-Request-ID": bad}).headers["x-request-id"] for bad in ("a b", "x" * 500, "")
    }
    assert len(made) == 3 and all(len(request_id) == 32 for request_id in made)


def test_every_response_has_its_headers(client):
    for path in ("/healthz", "/nothing", "/docs", "/static/docs.js"):
        headers = client.get(path).headers
        assert headers["x-content-type-options"] == "nosniff"
        assert "total;dur=" in headers["server-timing"] and headers["x-request-id"]
        assert "default-src 'none'" in headers["content-security-policy"]
    assert client.get("/healthz").headers["cache-control"] == "no-store"
    assert client.get("/static/docs.js").headers["cache-control"] == "no-cache"


def test_an_error_nobody_foresaw_tells_nothing_but_the_request_id(tiny_artifact, png, monkeypatch, caplog):
    def fail(*args, **options):
        raise KeyError("a secret of the inside")

    monkeypatch.setattr("app.service.describe_prediction", fail)
    with open_client(artifact=tiny_artifact, cors_origins=("https://a.example",)) as client:
        headers = {"X-Request-ID": "here", "Origin": "https://a.example"}
        response = client.post_image("/predict", png, headers=headers)
    assert response.status_code == 500
    assert response.headers["content-type"] == "application/problem+json"
    assert response.headers["access-control-allow-origin"] == "https://a.example"
    assert response.json()["code"] == "internal_error" and response.json()["request_id"] == "here"
    assert "secret" not in response.text
    assert "a secret of the inside" in caplog.text


def test_a_body_over_the_limit_is_refused(tiny_artifact):
    with open_client(artifact=tiny_artifact, max_body_mib=0.01) as client:
        announced = client.post_image("/predict", b"x" * 20_000)
        assert announced.status_code == 413 and announced.json()["code"] == "body_too_large"

        async def stream():
            for _ in range(20):
                yield b"x" * 1000

        streamed = client.post("/predict", content=stream(), headers={"Content-Type": "image/png"})
        assert "content-length" not in streamed.request.headers
        assert streamed.status_code == 413 and streamed.json()["code"] == "body_too_large"
        assert client.post_image("/predict", b"x" * 10_000).status_code == 415


@pytest.mark.anyio
async def test_bodies_that_are_too_much_together_are_refused_until_some_are_answered():
    largest = SMALL_BYTES + 1
    answered, read = asyncio.Event(), asyncio.Event()

    async def hold(scope, receive, send):
        await receive()
        await answered.wait()
        await send({"type": "http.response.start"})

    limit = BodyLimit(hold, max_bytes=largest)

    async def upload(size: int) -> None:
        async def receive():
            return {"type": "http.request", "body": b"x" * size, "more_body": False}

        async def send(message):
            await read.wait()

        await limit({"type": "http", "headers": []}, receive, send)

    slow = [asyncio.create_task(upload(largest)) for _ in range(LARGEST_AT_ONCE)]
    while limit.held_bytes < LARGEST_AT_ONCE * largest:
        await asyncio.sleep(0)
    small = asyncio.create_task(upload(1))
    with pytest.raises(TooManyUploads, match=r"are 1 MiB together already; send fewer or smaller ones"):
        await upload(largest)
    answered.set()
    while limit.held_bytes:  # although nobody has read an answer yet
        await asyncio.sleep(0)
    another = asyncio.create_task(upload(largest))
    read.set()
    await asyncio.gather(*slow, small, another)
    assert limit.held_bytes == 0


@pytest.mark.anyio
async def test_a_hang_up_is_heard_however_full_it_is():
    """Whoever watches for it must not be told of uploads instead."""
    limit = BodyLimit(None, max_bytes=SMALL_BYTES + 1)  # type: ignore[arg-type]
    limit.held_bytes = 100 * SMALL_BYTES
    messages = iter([{"type": "http.request", "body": b"x", "more_body": False}, {"type": "http.disconnect"}])
    heard = []

    async def app(scope, receive, send):
        heard.extend([(await receive())["type"], (await receive())["type"]])

    async def receive():
        return next(messages)

    limit.app = app
    await limit({"type": "http", "headers": []}, receive, None)  # type: ignore[arg-type]
    assert heard == ["http.request", "http.disconnect"]
