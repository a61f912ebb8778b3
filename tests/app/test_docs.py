"""The served OpenAPI document: complete, true, and usable from the docs page."""

import json

import pytest

from app.errors import HTTP_KINDS, KINDS
from app.intake import ACCEPTED_TYPES
from model.pixels import MAX_MPP, MIN_MPP
from tests.app.conftest import open_client

POSTS = ["/predict", "/predict/batch", "/attention", "/features"]


@pytest.fixture(scope="module")
def document(client):
    return client.get("/openapi.json").json()


def test_every_route_is_there_with_its_texts(document):
    assert sorted(document["paths"]) == sorted([*POSTS, "/model", "/healthz", "/readyz", "/metrics"])
    for operations in document["paths"].values():
        for operation in operations.values():
            assert operation["summary"] and operation["tags"]
            assert all(
                parameter["schema"] and parameter["description"] for parameter in operation.get("parameters", [])
            )


@pytest.mark.parametrize("path", ["/predict", "/attention", "/features"])
def test_both_bodies_offer_a_file_picker(document, path):
    content = document["paths"][path]["post"]["requestBody"]["content"]
    form = content.pop("multipart/form-data")["schema"]
    assert form["properties"]["file"]["format"] == "binary" and form["required"] == ["file"]
    assert tuple(content) == ACCEPTED_TYPES
    assert all(body["schema"] == {"type": "string", "format": "binary"} for body in content.values())


def test_the_list_of_files_offers_one_too(document):
    content = document["paths"]["/predict/batch"]["post"]["requestBody"]["content"]
    files = content["multipart/form-data"]["schema"]["properties"]["files"]
    assert files["items"] == {"type": "string", "format": "binary"} and files["maxItems"] == 64


def test_maps_can_be_asked_for_as_pictures(document):
    content = document["paths"]["/attention"]["post"]["responses"]["200"]["content"]
    assert set(content) == {"application/json", "image/png", "application/x-npy"}


def test_every_error_code_is_documented_on_some_route(document):
    text = json.dumps(document)
    for kind in (*KINDS.values(), *HTTP_KINDS.values()):
        if kind.status not in (404, 405, 499):  # of no route, of no method, and told to nobody
            assert f'"code": "{kind.code}"' in text, kind.code


def test_problems_have_their_own_media_type_and_schema(document):
    assert "HTTPValidationError" not in document["components"]["schemas"]
    for path in POSTS:
        for status, response in document["paths"][path]["post"]["responses"].items():
            if status != "200":
                body = response["content"]["application/problem+json"]
                assert body["schema"] == {"$ref": "#/components/schemas/Problem"}
                assert all(example["value"]["status"] == int(status) for example in body["examples"].values())
        assert "Retry-After" in document["paths"][path]["post"]["responses"]["503"]["headers"]


def test_operations_have_names_that_generated_clients_can_use(document):
    names = [operation["operationId"] for path in document["paths"].values() for operation in path.values()]
    assert sorted(names) == [
        *("attention", "features", "healthz", "metrics", "model", "predict", "predict_batch", "readyz")
    ]


def test_the_service_is_where_its_document_is(document):
    assert document["servers"] == [{"url": "."}]  # also behind a path that a proxy strips


def test_limits_of_the_scale_are_told(document):
    (mpp,) = (p for p in document["paths"]["/predict"]["post"]["parameters"] if p["name"] == "mpp")
    assert (mpp["schema"]["minimum"], mpp["schema"]["maximum"]) == (MIN_MPP, MAX_MPP)


def test_no_parameter_may_be_null(document):
    parameters = [p for path in POSTS for p in document["paths"][path]["post"].get("parameters", [])]
    assert parameters and not any("null" in json.dumps(parameter["schema"]) for parameter in parameters)


def test_all_references_lead_somewhere(document):
    def walk(node):
        if isinstance(node, dict):
            if "$ref" in node:
                yield node["$ref"]
            for value in node.values():
                yield from walk(value)
        elif isinstance(node, list):
            for value in node:
                yield from walk(value)

    for reference in set(walk(document)):
        assert reference.removeprefix("#/components/schemas/") in document["components"]["schemas"], reference


def test_every_field_of_an_answer_has_an_example(document):
    for name, schema in document["components"]["schemas"].items():
        for field, description in schema.get("properties", {}).items():
            shown = {"examples", "$ref", "anyOf", "items", "const"} & set(description)
            assert shown, f"{name}.{field}"


def test_the_key_is_shown_where_one_is_asked_for(document, tiny_artifact):
    assert "securitySchemes" not in document["components"]
    with open_client(artifact=tiny_artifact, api_keys=("key",)) as client:
        locked = client.get("/openapi.json").json()
    assert set(locked["components"]["securitySchemes"]) == {"Key", "Bearer"}
    guarded = {path for path, operations in locked["paths"].items() if "security" in next(iter(operations.values()))}
    assert guarded == {*POSTS, "/model", "/metrics"}
