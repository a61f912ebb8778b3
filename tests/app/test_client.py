import asyncio
import gzip
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from app.client import LARGEST_ANSWER_BYTES, Card, Unanswered, ask, ask_all, ask_features, ask_model, connect, open_here
from app.export import Answer
from app.settings import Settings
from tests.app.documents import PREDICTION, write_problem

PROBLEM_TYPE = {"Content-Type": "application/problem+json"}
CARD: dict[str, Any] = {
    "classes": [{"name": "Tumor", "description": "Tumour epithelium", "color": "#c80000"}],
    "tile_px": 150,
    "tile_mpp": 0.495,
    "feature_width": 32,
}


def call(coroutine_of, answer) -> object:
    """Runs what is asked of a service that answers by the function given."""

    async def run() -> object:
        async with httpx.AsyncClient(base_url="http://there", transport=httpx.MockTransport(answer)) as client:
            return await coroutine_of(client)

    return asyncio.run(run())


def gather(pictures: list[Path], answer) -> list[Answer]:
    async def run(client: httpx.AsyncClient) -> list[Answer]:
        return [answer async for answer in ask_all(client, pictures, {})]

    answers = call(run, answer)
    assert isinstance(answers, list)
    return answers


def test_busy_service_is_asked_again_when_it_says():
    answers = iter([httpx.Response(503, headers={"Retry-After": "0"}), httpx.Response(200, json=CARD)])
    assert call(ask_model, lambda request: next(answers)) == Card.model_validate(CARD)


def test_service_that_stays_busy_is_given_up():
    problem = write_problem("queue_full", "the queue is full")
    headers = {"Retry-After": "0", **PROBLEM_TYPE}
    asked = []

    def refuse(request: httpx.Request) -> httpx.Response:
        asked.append(request)
        return httpx.Response(503, headers=headers, json=problem)

    with pytest.raises(Unanswered, match="the queue is full") as caught:
        call(ask_model, refuse)
    assert caught.value.problem == problem
    assert 2 < len(asked) < 20


def test_other_servers_are_recognised():
    with pytest.raises(Unanswered, match="http://there/model answered 404 Not Found: is it a tissue service"):
        call(ask_model, lambda request: httpx.Response(404, text="<html>"))


def test_last_refusal_is_passed_on_without_waiting_once_more(monkeypatch):
    waits = []

    async def note(seconds: float) -> None:
        waits.append(seconds)

    monkeypatch.setattr(asyncio, "sleep", note)
    asked = []

    def refuse(request: httpx.Request) -> httpx.Response:
        asked.append(request)
        return httpx.Response(503, headers={"Retry-After": "60"})

    with pytest.raises(Unanswered):
        call(ask_model, refuse)
    assert waits == [60] * (len(asked) - 1)


@pytest.mark.anyio
async def test_a_key_beyond_ascii_travels_and_an_address_that_is_none_is_told():
    for url in ("http://127.0.0.1:1", "http://[", "nowhere", "http://127.0.0.1:99999", "http://xn--a", "ftp://there"):
        with pytest.raises(Unanswered, match=r"nobody answers|is no address"):
            async with connect(url, "schlüssel") as client:
                assert client.headers.raw[-1] == (b"X-API-Key", "schlüssel".encode())
                assert client.headers["Accept-Encoding"] == "identity"
                await ask_model(client)


@pytest.mark.anyio
@pytest.mark.parametrize("key", ["a\nb", "\udcff", "x\x01"])
async def test_a_key_that_no_header_can_carry_is_at_fault_itself(key):
    with pytest.raises(Unanswered, match="the key"):
        async with connect("http://127.0.0.1:1", key):
            raise AssertionError


@pytest.mark.parametrize(
    "answer",
    [
        httpx.Response(200, text="<html>"),
        httpx.Response(200, json=[]),
        httpx.Response(200, json={"status": "ok"}),
        httpx.Response(200, json=CARD | {"classes": ["Tumor"]}),
        httpx.Response(200, json=CARD | {"classes": [CARD["classes"][0] | {"color": "zz"}]}),
        httpx.Response(200, json=CARD | {"classes": [CARD["classes"][0] | {"name": "\x1b]0;pwned\x07"}]}),
        httpx.Response(200, json=CARD | {"feature_width": 10**12}),
        httpx.Response(200, json=CARD | {"feature_width": -1}),
        httpx.Response(200, text=json.dumps(CARD).replace("0.495", "1e999")),
        httpx.Response(200, text="[" * 200_000),
        httpx.Response(200, json=CARD, headers={"Content-Encoding": "br"}),
        httpx.Response(200, content=gzip.compress(b"{}"), headers={"Content-Encoding": "gzip"}),
        httpx.Response(422, json={}, headers=PROBLEM_TYPE),
        httpx.Response(422, text="no", headers=PROBLEM_TYPE),
        httpx.Response(422, text="[" * 200_000, headers=PROBLEM_TYPE),
        httpx.Response(422, json=write_problem("x", "y") | {"code": ["x"]}, headers=PROBLEM_TYPE),
        httpx.Response(422, json=write_problem("x", "y") | {"detail": {}}, headers=PROBLEM_TYPE),
    ],
)
def test_what_is_no_answer_of_a_service_is_said_to_be_none(answer):
    with pytest.raises(Unanswered, match="is it a tissue service"):
        call(ask_model, lambda request: answer)


def test_an_answer_without_an_end_is_left():
    sent = []

    async def go_on() -> AsyncIterator[bytes]:
        while True:
            sent.append(1 << 16)
            yield b" " * (1 << 16)

    with pytest.raises(Unanswered, match="over 16 MiB: is it a tissue service"):
        call(ask_model, lambda request: httpx.Response(200, content=go_on()))
    assert sum(sent) <= LARGEST_ANSWER_BYTES + (1 << 17)


@pytest.mark.parametrize("wait", ["86400", "²", "9" * 5000])
def test_nobody_waits_for_a_day(wait, monkeypatch):
    waits = []

    async def note(seconds: float) -> None:
        waits.append(seconds)

    monkeypatch.setattr(asyncio, "sleep", note)
    with pytest.raises(Unanswered, match="answered 503"):
        call(ask_model, lambda request: httpx.Response(503, headers=[(b"Retry-After", wait.encode())]))
    assert max(waits, default=0) <= 1


def test_lost_connection_is_told():
    def break_off(request: httpx.Request) -> httpx.Response:
        raise httpx.ReadTimeout("")

    with pytest.raises(Unanswered, match=r"nobody answers at http://there \(ReadTimeout\)"):
        call(ask_model, break_off)


def test_picture_travels_raw_and_options_in_the_query(tmp_path: Path):
    picture = tmp_path / "a.png"
    picture.write_bytes(b"bytes")
    seen = []

    def answer(request: httpx.Request) -> httpx.Response:
        seen.append(request)
        return httpx.Response(200, content=request.content)

    query = {"mpp": "0.5", "tta": True, "coverage": None}
    response = call(lambda client: ask(client, "/predict", picture, query), answer)
    assert isinstance(response, httpx.Response) and response.content == b"bytes"
    assert seen[0].headers["Content-Type"].startswith("image/")
    assert dict(seen[0].url.params) == {"mpp": "0.5", "tta": "true"}


def test_answers_come_in_the_order_of_the_pictures(tmp_path: Path):
    pictures = [tmp_path / f"{number}.png" for number in range(20)]
    for picture in pictures[1:]:
        picture.write_bytes(picture.name.encode())

    async def answer(request: httpx.Request) -> httpx.Response:
        await asyncio.sleep(0)  # others overtake
        return httpx.Response(200, json=PREDICTION | {"label": request.content.decode()})

    answers = gather(pictures, answer)
    assert [item["file"] for item in answers] == [str(picture) for picture in pictures]
    assert answers[0]["error"]["code"] == "unreadable_file"
    assert [item["label"] for item in answers[1:]] == [picture.name for picture in pictures[1:]]


@pytest.mark.parametrize(
    "garbage",
    [
        {},
        {"error": "boom"},
        PREDICTION | {"confidence": "high"},
        PREDICTION | {"confidence": "0.9"},
        PREDICTION | {"verdict": "\x1b[31m"},
        PREDICTION | {"input": {}},
        PREDICTION | {"reasons": ["blurred"]},
    ],
)
def test_what_is_no_prediction_fails_its_picture_alone(tmp_path: Path, garbage):
    (tmp_path / "a.png").write_bytes(b"bytes")
    answers = iter([garbage, PREDICTION])
    wrong, right = gather([tmp_path / "a.png"] * 2, lambda request: httpx.Response(200, json=next(answers)))
    assert "is it a tissue service" in wrong["error"]["detail"] and list(wrong) == ["file", "error"]
    assert right == {"file": str(tmp_path / "a.png"), **PREDICTION}


def test_what_is_noted_of_the_picture_here_is_not_the_servers_to_say(tmp_path: Path):
    (tmp_path / "a.png").write_bytes(b"bytes")
    claims = {"file": "b.png", "box": {"x": 1}, "error": "boom"}
    (item,) = gather([tmp_path / "a.png"], lambda request: httpx.Response(200, json=PREDICTION | claims))
    assert item == {"file": str(tmp_path / "a.png"), **PREDICTION}


def test_ctrl_c_ends_it_without_a_server_too(tiny_artifact: Path, png: bytes, tmp_path: Path):
    (tmp_path / "a.png").write_bytes(png)

    async def ask_until_cancelled() -> None:
        async with open_here(Settings(artifact=tiny_artifact)) as service:
            async for _ in ask_all(service, [tmp_path / "a.png"] * 50, {}):
                if (task := asyncio.current_task()) and not task.cancelling():
                    task.cancel()

    with pytest.raises(asyncio.CancelledError):
        asyncio.run(ask_until_cancelled())


@pytest.mark.anyio
async def test_without_a_server_no_body_is_too_large(tiny_artifact: Path, png: bytes):
    assert len(png) > 0.001 * 2**20
    async with open_here(Settings(artifact=tiny_artifact, max_body_mib=0.001)) as service:
        assert (await ask(service, "/predict", png, {})).is_success


def test_an_option_that_is_wrong_for_all_ends_it(tmp_path: Path):
    (tmp_path / "a.png").write_bytes(b"bytes")
    problem = write_problem("coverage_unavailable", "no such coverage")
    asked = []

    async def refuse(request: httpx.Request) -> httpx.Response:
        asked.append(request)
        return httpx.Response(422, json=problem, headers=PROBLEM_TYPE)

    with pytest.raises(Unanswered, match="no such coverage"):
        gather([tmp_path / "a.png"] * 100, refuse)
    assert len(asked) < 10


def test_features_that_do_not_come_are_told(tmp_path: Path):
    pictures = [tmp_path / name for name in ("a.png", "b.png", "c.png", "d.png")]
    for picture in pictures:
        picture.write_bytes(picture.name.encode())
    row = {name: PREDICTION[name] for name in ("input", "model")} | {"features": [1.0] * 4}

    def answer(request: httpx.Request) -> httpx.Response:
        match request.content:
            case b"a.png":
                return httpx.Response(200, json=row)
            case b"b.png":
                return httpx.Response(200, text="<html>")
            case b"c.png":
                return httpx.Response(200, json=row | {"features": [1.0] * 7})
            case _:
                return httpx.Response(500, json={"detail": "the cause is in the log"})

    found = call(lambda client: ask_features(client, pictures, None, 4), answer)
    assert isinstance(found, tuple)
    rows, missing = found
    assert np.isnan(rows).all(axis=1).tolist() == [False, True, True, True]
    assert "what are no features" in missing[str(pictures[1])] and "answered 500" in missing[str(pictures[3])]
    assert "7 features, where its model has 4" in missing[str(pictures[2])]
