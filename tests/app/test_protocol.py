import asyncio
from contextlib import suppress
from http.client import HTTPResponse

import pytest
import uvicorn
from uvicorn.server import ServerState

from app.protocol import HEAD_BYTES, MOST_WAITING, BoundedProtocol
from tests.app.conftest import PATIENCE_S
from tests.app.sockets import connect, request_head


@pytest.fixture
def talk():
    """Connections to a server with our protocol, whose every answer is 204, or large where /large is asked for."""

    async def answer(scope, receive, send):
        while scope["path"] != "/refused" and (await receive()).get("more_body"):
            pass
        if scope["path"] == "/watched":
            assert (await receive())["type"] == "http.disconnect"
        late = [header for header in scope["headers"] if header[0] == b"x-late"]
        await send(
            {"type": "http.response.start", "status": 200 if scope["path"] == "/large" else 204, "headers": late}
        )
        await send({"type": "http.response.body", "body": b"x" * (1 << 24) if scope["path"] == "/large" else b""})
        done.append(scope["path"])

    done: list[str] = []

    def run(scenario) -> list[str]:
        async def serve() -> None:
            config = uvicorn.Config(answer, lifespan="off", log_config=None)
            config.load()
            state = ServerState()
            loop = asyncio.get_running_loop()
            server = await loop.create_server(lambda: BoundedProtocol(config, state, {}), "127.0.0.1")
            host, port = server.sockets[0].getsockname()
            async with server, asyncio.timeout(PATIENCE_S):
                await scenario(lambda: asyncio.open_connection(host, port, limit=1 << 10))
                while state.tasks or state.connections:
                    await asyncio.sleep(0.01)

        asyncio.run(serve())
        return done

    return run


def test_a_head_may_come_in_pieces_but_not_without_end(talk):
    async def scenario(connect) -> None:
        reader, writer = await connect()
        for piece in (b"GET / HTTP/1.1\r", b"\nHost: x\r\nUpg", b"rade: h2c\r\nConnection: upgrade\r\n\r", b"\n"):
            writer.write(piece)
            await asyncio.sleep(0.01)
        assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 204")
        writer.write(request_head("/", "X: " + "x" * HEAD_BYTES))
        assert (await reader.read(1 << 16)).startswith(b"HTTP/1.1 400")
        writer.close()

        reader, writer = await connect()
        writer.write(b"GET / HTTP/1.1\r\n" + b"a: b\r\n" * HEAD_BYTES)
        assert (await reader.read(1 << 16)).startswith(b"HTTP/1.1 400")
        writer.close()

    assert talk(scenario) == ["/"]


def test_a_head_of_bare_line_feeds_is_answered_at_once(talk):
    async def scenario(connect) -> None:
        reader, writer = await connect()
        writer.write(b"GET / HTTP/1.1\nHost: x\n\n")
        assert (await reader.readline()).startswith(b"HTTP/1.1 ")  # whatever the parser makes of it
        writer.close()

    talk(scenario)


def test_an_answer_that_nobody_reads_is_given_up(talk, monkeypatch):
    monkeypatch.setattr("app.protocol.READ_S", 0.05)

    async def scenario(connect) -> None:
        reader, writer = await connect()
        writer.write(request_head("/large", "Content-Length: 0"))
        await reader.read(1)
        await asyncio.sleep(0.2)
        with suppress(ConnectionError):
            while await reader.read(1 << 16):  # what was under way; a connection that goes on would never end
                pass
        writer.close()

    assert talk(scenario) == ["/large"]


def test_a_refused_body_may_end_but_not_drip_for_ever(talk, monkeypatch):
    monkeypatch.setattr("app.protocol.REST_S", 0.1)

    async def scenario(connect) -> None:
        request = request_head("/refused", "Content-Length: 3")
        reader, writer = await connect()
        writer.write(request)
        assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 204")
        writer.write(b"a")
        assert await reader.read() == b""  # hung up on
        writer.close()
        reader, writer = await connect()
        writer.write(request)
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"abc")  # whoever ends in time goes on
        await asyncio.sleep(0.2)
        writer.write(request_head("/", "Content-Length: 0"))
        assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 204")
        writer.close()

    assert talk(scenario) == ["/refused", "/refused", "/"]


def test_whoever_never_ends_a_head_is_hung_up_on(talk, monkeypatch):
    monkeypatch.setattr("app.protocol.HEAD_S", 0.05)

    async def scenario(connect) -> None:
        request = request_head("/", "Content-Length: 3")
        for half in (b"", request[:-2]):
            reader, writer = await connect()
            writer.write(half)
            assert await reader.read() == b""
            writer.close()
        reader, writer = await connect()
        writer.write(request + b"abc" + request[:-2])  # behind another request
        await asyncio.sleep(0.01)
        writer.write(b"\r")
        assert (await reader.read()).startswith(b"HTTP/1.1 204")
        writer.close()
        reader, writer = await connect()
        writer.write(request)  # a slow body is another matter
        await asyncio.sleep(0.1)
        writer.write(b"abc")
        assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 204")
        writer.close()

    assert talk(scenario) == ["/"] * 2


def test_a_few_requests_may_be_sent_ahead_but_not_thousands(talk):
    async def scenario(connect) -> None:
        one = request_head("/", "Content-Length: 0")
        reader, writer = await connect()
        writer.write(one * (MOST_WAITING + 1))
        for _ in range(MOST_WAITING + 1):
            assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 204")
        writer.close()
        reader, writer = await connect()
        writer.write(one * 1000)
        assert b"HTTP/1.1 400" in await reader.read()
        writer.close()

    assert len(talk(scenario)) <= MOST_WAITING + 2


def test_whoever_hangs_up_is_noticed_behind_requests_sent_ahead(talk):
    async def scenario(connect) -> None:
        _, writer = await connect()
        writer.write(request_head("/watched", "Content-Length: 0") + request_head("/", "Content-Length: 0"))
        await asyncio.sleep(0.05)
        writer.close()

    assert talk(scenario) == ["/watched"]


@pytest.mark.parametrize("offer", ["Upgrade: h2c", "upgrade:h2c"])
def test_a_body_behind_an_offer_that_is_sent_ahead_is_no_request(talk, offer):
    async def scenario(connect) -> None:
        reader, writer = await connect()
        hidden = request_head("/hidden")
        writer.write(
            request_head("/", "Content-Length: 0")
            + request_head("/", f"Content-Length: {len(hidden)}", "Connection: Upgrade", offer)
        )
        assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 204")
        writer.write(hidden)
        assert b"connection: close" in await reader.read()
        writer.close()

    assert talk(scenario) == ["/", "/"]


def test_what_stands_behind_a_chunked_body_is_no_header(talk):
    async def scenario(connect) -> None:
        reader, writer = await connect()
        chunked = request_head("/", "Transfer-Encoding: chunked")
        writer.write(chunked + b"3\r\nabc\r\n0\r\nX-Late: 1\r\n\r\n" + chunked + b"0\r\n\r\n")
        for _ in range(2):
            answer = await reader.readuntil(b"\r\n\r\n")
            assert answer.startswith(b"HTTP/1.1 204") and b"x-late" not in answer
        writer.close()

    assert talk(scenario) == ["/", "/"]


@pytest.mark.parametrize("pause", [False, True])
def test_an_offer_to_change_to_http_2_costs_no_picture(server, png, pause):
    offer = ("Connection: Upgrade, HTTP2-Settings", "Upgrade: h2c", "HTTP2-Settings: AAEAAEAAAAIAAAAB")
    head = request_head("/predict", f"Content-Length: {len(png)}", *offer)
    with connect(server) as connection:
        for _ in range(2):  # Java's HttpClient sends the head and the body apart
            for piece in (head, png) if pause else (head + png,):
                connection.sendall(piece)
            with HTTPResponse(connection) as answer:
                answer.begin()
                assert answer.status == 200, answer.read()
                answer.read()
