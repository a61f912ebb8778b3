import asyncio
import time
from typing import Annotated

import httpx
import pytest
from fastapi import APIRouter, FastAPI, Query, Request
from fastapi.responses import PlainTextResponse
from fastapi.routing import APIRoute
from pydantic import BaseModel, ConfigDict, Field

from app.options import OptionsRoute


class Options(BaseModel):
    model_config = ConfigDict(extra="forbid")

    size: int = Field(1, le=10)
    name: str | None = None


class Strict(Options):
    size: int


def request(route_class: type[APIRoute], method: str, target: str) -> httpx.Response:
    router = APIRouter(route_class=route_class)

    @router.post("/both")
    async def both(request: Request, options: Annotated[Options, Query()]) -> PlainTextResponse:
        return PlainTextResponse(repr(options))

    @router.get("/strict")
    async def strict(request: Request, options: Annotated[Strict, Query()]) -> PlainTextResponse:
        return PlainTextResponse(repr(options))

    @router.get("/none")
    async def none() -> dict[str, int]:
        return {"answer": 1}

    app = FastAPI()
    app.include_router(router)

    async def send() -> httpx.Response:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as client:
            return await client.request(method, target)

    return asyncio.run(send())


QUERIES = [
    "",
    "size=3",
    "name=",
    "name=a%20b&size=10",
    "size=11",
    "size=x&name=y",
    "size=",
    "sise=3",
    "sise=3&size=x",
]


@pytest.mark.parametrize("query", QUERIES)
@pytest.mark.parametrize(("method", "path"), [("POST", "/both"), ("GET", "/strict"), ("GET", "/none")])
def test_answers_as_fastapi_does(method: str, path: str, query: str) -> None:
    usual, ours = (request(kind, method, f"{path}?{query}") for kind in (APIRoute, OptionsRoute))
    assert (ours.status_code, ours.text) == (usual.status_code, usual.text)


def test_is_described_as_fastapi_does() -> None:
    usual, ours = (request(kind, "GET", "/openapi.json").json() for kind in (APIRoute, OptionsRoute))
    assert ours == usual
    assert [one["name"] for one in ours["paths"]["/both"]["post"]["parameters"]] == ["size", "name"]


def test_what_is_given_twice_is_refused_since_one_would_be_overlooked() -> None:
    refused = request(OptionsRoute, "POST", "/both?size=3&name=a&size=4")
    assert refused.status_code == 422
    assert [error["loc"] for error in refused.json()["detail"]] == [["query", "size"]]


def test_thousands_of_parameters_are_refused_in_few_words_and_no_time() -> None:
    started_at = time.process_time()
    refused = request(OptionsRoute, "POST", "/both?" + "&".join(f"{n:x}" for n in range(10_000)) + "&1" * 5_000)
    assert refused.status_code == 422
    assert refused.json()["detail"][0]["msg"] == "15000 parameters came, at most 32 are read"
    assert len(refused.content) < 200
    assert time.process_time() - started_at < 2  # counting each anew takes seconds
