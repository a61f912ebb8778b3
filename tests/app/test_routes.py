"""Every route through the whole service in this process: bytes in, bytes out."""

import gc
import hashlib
import io
from importlib.metadata import version

import numpy as np
import pytest
from PIL import Image

from app import samples, service
from app.metrics import Metrics
from app.samples import SMALL_BYTES
from app.schemas import Attention, Features, HeadsAttention, ModelCard, Prediction
from app.settings import SHIPPED_ARTIFACT
from model.pixels import Picture
from tests.app.conftest import encode, open_client
from training.synthetic import SHIPPED_KINDS, draw_tile

PROBLEM = "application/problem+json"


def post_form(client, path, *files, field="file", **options):
    return client.post(path, files=[(field, file) for file in files], **options)


def test_a_prediction_says_all_that_the_contract_promises(client, png):
    response = client.post_image("/predict", png)
    assert response.status_code == 200
    answer = response.json()
    Prediction.model_validate(answer, strict=False)
    assert list(answer["probabilities"]) == list(SHIPPED_KINDS)
    assert sum(answer["probabilities"].values()) == pytest.approx(1, abs=1e-5)
    assert answer["confidence"] == answer["probabilities"][answer["label"]] == max(answer["probabilities"].values())
    assert answer["prediction_set"] is None and answer["tta"] is None
    assert answer["input"]["sha256"] == hashlib.sha256(png).hexdigest()
    assert answer["input"]["format"] == "PNG" and answer["input"]["box"] == [0, 0, 150, 150]
    assert answer["input"]["mpp"] is None and answer["input"]["mpp_source"] == "unknown"
    assert answer["quality"]["tissue_share"] > 0.5
    assert answer["quality"]["foreign_share"] == 0  # the artefact of the tests knows every colour
    assert answer["quality"]["distance"] > 0
    assert answer["model"]["name"] == "tiny" and len(answer["model"]["digest"]) == 64
    stages = [span.partition(";")[0] for span in response.headers["server-timing"].split(", ")]
    assert stages == ["upload", "decode", "queue", "infer", "total"]


def test_the_answer_is_the_same_whoever_reads_the_picture(client, png, monkeypatch):
    by_the_model = client.post_image("/predict", png).json()
    monkeypatch.setattr(service, "SMALL_BYTES", 0)
    assert client.post_image("/predict", png).json() == by_the_model


@pytest.mark.parametrize("path", ["/predict", "/predict?tta=true", "/attention", "/features"])
def test_many_pixels_in_few_bytes_are_read_with_the_large(client, monkeypatch, path):
    flat = encode(np.full((1200, 1200, 3), 230, np.uint8))
    assert len(flat) < SMALL_BYTES
    limits, large = [], []
    decoders = client.app.state.service._decoders
    read_large = decoders.read_large

    def take_sample(data, manifest, mpp, max_megapixels, palette):
        limits.append(max_megapixels)
        return samples.take_sample(data, manifest, mpp, max_megapixels, palette)

    def note_large(work, megapixels, patience_s):
        large.append(megapixels)
        return read_large(work, megapixels, patience_s)

    monkeypatch.setattr(service, "take_sample", take_sample)
    monkeypatch.setattr(decoders, "read_large", note_large)
    assert client.post_image(path, flat).status_code == 200
    assert {*limits[:-1]} == {service.SMALL_MEGAPIXELS} and limits[-1] == 50
    assert large == [1.44]


def test_too_many_pixels_are_refused_without_waiting_among_the_large(client, monkeypatch):
    monkeypatch.setattr(client.app.state.service._decoders, "read_large", None)
    response = client.post_image("/attention", encode(np.zeros((7200, 7200), np.uint8)))
    assert response.status_code == 413 and "at most 50 are accepted" in response.json()["detail"]


def test_raw_and_form_get_the_same_answer(client, png):
    assert post_form(client, "/predict", ("x.png", png)).json() == client.post_image("/predict", png).json()


@pytest.mark.parametrize(
    ("form", "options"), [("PNG", {}), ("JPEG", {}), ("TIFF", {}), ("BMP", {}), ("WEBP", {"lossless": True})]
)
def test_all_five_formats_whatever_the_content_type_says(client, form, options):
    response = client.post_image("/predict", encode(draw_tile(1, 1), form, **options))
    assert response.json()["input"]["format"] == form


def test_a_known_scale_takes_the_centre(client):
    field = encode(np.tile(draw_tile(1, 1), (2, 2, 1)))
    known = client.post_image("/predict?mpp=0.495", field).json()
    assert known["input"]["box"] == [75, 75, 225, 225] and known["input"]["mpp_source"] == "request"
    assert client.post_image("/predict", field).json()["input"]["box"] == [0, 0, 300, 300]


def test_tta_averages_eight_views_and_reports_their_disagreement(client, png):
    plain, averaged = client.post_image("/predict", png).json(), client.post_image("/predict?tta=true", png).json()
    assert averaged["tta"]["views"] == 8 and averaged["tta"]["spread"] > 0
    views = [client.post_image("/predict", encode(view)).json()["probabilities"] for view in all_views(png)]
    for name, share in averaged["probabilities"].items():
        assert share == pytest.approx(np.mean([view[name] for view in views]), abs=1e-5)
    assert averaged["probabilities"] != plain["probabilities"]
    turned = encode(np.rot90(np.asarray(Image.open(io.BytesIO(png)))))
    same = client.post_image("/predict?tta=true", turned).json()["probabilities"]
    assert same == pytest.approx(averaged["probabilities"], abs=1e-5)


def all_views(png):
    tile = np.asarray(Image.open(io.BytesIO(png)))
    return [np.rot90(side, turns) for side in (tile, tile[:, ::-1]) for turns in range(4)]


def test_a_batch_answers_each_image_for_itself(client, png, pictures):
    files = [("a.png", pictures[0]), ("b.png", b"rubbish"), ("c.jpg", pictures[4]), ("", png), ("e.png", b"")]
    items = post_form(client, "/predict/batch", *files, field="files").json()
    assert [item["file"] for item in items][:3] == ["a.png", "b.png", "c.jpg"]
    for item, (_, data) in zip(items, files, strict=True):
        if data in (b"rubbish", b""):
            assert item["error"]["code"] == ("unsupported_format" if data else "no_image")
            assert item["error"]["status"] == (415 if data else 400)
        else:
            alone = client.post_image("/predict", data).json()
            assert {name: value for name, value in item.items() if name != "file"} == alone


def test_a_batch_of_64_and_not_of_65(client, png):
    files = [("x.png", png)] * 64
    items = post_form(client, "/predict/batch", *files, field="files").json()
    assert len(items) == 64 and all(item["label"] for item in items)
    refused = post_form(client, "/predict/batch", *files, files[0], field="files")
    assert refused.status_code == 422 and refused.json()["code"] == "too_many_images"


def test_a_batch_with_tta_is_larger_than_the_queue(tiny_artifact, png):
    with open_client(artifact=tiny_artifact, max_queue=70) as client:
        items = post_form(client, "/predict/batch?tta=true", *[("x.png", png)] * 30, field="files").json()
    assert all(item["tta"]["views"] == 8 for item in items)


@pytest.mark.parametrize(("queue", "tta"), [(1, False), (4, False), (9, True)])
def test_a_batch_waits_for_its_turn_in_a_short_queue(tiny_artifact, png, queue, tta):
    with open_client(artifact=tiny_artifact, max_queue=queue) as client:
        items = post_form(client, f"/predict/batch?tta={tta}", *[("x.png", png)] * 24, field="files").json()
    assert [item.get("error") for item in items] == [None] * 24


def test_what_fails_within_a_batch_is_counted_as_what_fails_alone(tiny_artifact, png):
    with open_client(artifact=tiny_artifact) as client:
        post_form(client, "/predict/batch", ("a", b"rubbish"), ("b", png), ("c", b"rubbish"), field="files")
        assert 'tissue_problems_total{code="unsupported_format"} 2.0' in client.get("/metrics").text


@pytest.mark.parametrize("method", ["attention", "rollout", "evidence", "occlusion"])
def test_a_map_says_what_it_is(client, png, method):
    answer = client.post_image(f"/attention?method={method}&target=Stroma", png).json()
    Attention.model_validate(answer)
    grid = np.array(answer["grid"])
    assert grid.shape == (10, 10)
    assert (answer["limits"]["min"], answer["limits"]["max"]) == (grid.min(), grid.max())
    about_class = method in ("evidence", "occlusion")
    assert answer["class_specific"] == answer["signed"] == about_class
    assert answer["target"] == ("Stroma" if about_class else None)
    assert (answer["layer"], answer["head"]) == ((1, "mean") if method == "attention" else (None, None))
    assert answer["box"] == [0, 0, 150, 150]
    assert answer["prediction"]["probabilities"] == pytest.approx(
        client.post_image("/predict", png).json()["probabilities"], abs=1e-4
    )


def test_the_usual_method_and_target(client, png):
    answer = client.post_image("/attention", png).json()
    assert answer["method"] == "evidence"  # what the artefact recommends
    assert answer["target"] == answer["prediction"]["label"]


def test_each_answer_names_the_precision_that_it_was_computed_in(tiny_artifact, png):
    with open_client(artifact=tiny_artifact, precision="int8") as client:
        assert client.post_image("/predict", png).json()["model"]["precision"] == "int8"
        assert client.post_image("/attention", png).json()["prediction"]["model"]["precision"] == "fp32"


def test_attention_says_how_much_of_the_answer_it_shows(png):
    with open_client(artifact=SHIPPED_ARTIFACT) as shipped:
        sizes = shipped.get("/model").json()["architecture"]["sizes"]
        share = (1 - sizes["early_share"]) * (1 - sizes["colour_share"])
        for method, shown in (("attention", share), ("rollout", share), ("evidence", 1)):
            assert shipped.post_image(f"/attention?method={method}", png).json()["logit_share"] == shown
        drawn = Image.open(io.BytesIO(shipped.post_image("/attention?method=rollout&format=png", png).content))
        assert f"of {share:.0%} of the score" in drawn.info["caption"]


def test_layers_and_heads_can_be_chosen(client, png):
    mean = np.array(client.post_image("/attention?method=attention&layer=0", png).json()["grid"])
    heads = [
        np.array(client.post_image(f"/attention?method=attention&layer=0&head={head}", png).json()["grid"])
        for head in range(2)
    ]
    assert np.mean(heads, axis=0) == pytest.approx(mean, abs=1e-7)
    everything = client.post_image("/attention?method=attention&layout=heads", png).json()
    HeadsAttention.model_validate(everything)
    assert np.array(everything["grid"])[0] == pytest.approx(np.array(heads), abs=1e-7)


def test_tta_turns_the_maps_back(client, png):
    tile = np.asarray(Image.open(io.BytesIO(png)))
    straight = client.post_image("/attention?method=rollout&tta=true", png).json()
    turned = client.post_image("/attention?method=rollout&tta=true", encode(np.rot90(tile))).json()
    assert np.rot90(straight["grid"]) == pytest.approx(np.array(turned["grid"]), abs=1e-6)


def test_occlusion_in_both_sizes(client, png):
    coarse = np.array(client.post_image("/attention?method=occlusion", png).json()["grid"])
    fine = np.array(client.post_image("/attention?method=occlusion&masks=100", png).json()["grid"])
    assert len(np.unique(coarse)) <= 25 < len(np.unique(fine))
    assert (coarse[::2, ::2] == coarse[1::2, 1::2]).all()


def test_the_form_of_a_map(client, png):
    path = "/attention?method=attention"
    for headers, suffix in (({"Accept": "image/png"}, ""), ({"Accept": "application/json"}, "&format=png")):
        response = client.post_image(path + suffix, png, headers=headers)
        assert response.headers["content-type"] == "image/png" and response.headers["vary"] == "Accept"
        assert "render;dur=" in response.headers["server-timing"]
        assert Image.open(io.BytesIO(response.content)).format == "PNG"
    grid = np.load(io.BytesIO(client.post_image(path + "&format=npy", png).content))
    assert grid.dtype == np.float32
    assert grid.tolist() == client.post_image(path, png).json()["grid"]
    two_lines = client.post(path, content=png, headers=[("Accept", "text/html"), ("Accept", "image/png")])
    assert two_lines.headers["content-type"] == "image/png"
    refused = client.post_image(path, png, headers={"Accept": "text/html"})
    assert refused.status_code == 406 and refused.json()["code"] == "not_acceptable"


@pytest.mark.parametrize("method", ["attention", "rollout", "evidence"])
@pytest.mark.parametrize("options", ["", "&colormap=magma&alpha=1&upsample=bicubic&mpp=0.495"])
def test_pictures_can_be_drawn_of_all_maps(client, png, method, options):
    response = client.post_image(f"/attention?format=png&method={method}{options}", png)
    Image.open(io.BytesIO(response.content)).load()


def test_all_heads_in_one_picture(client, png):
    response = client.post_image("/attention?format=png&method=attention&layout=heads", png)
    Image.open(io.BytesIO(response.content)).load()


def test_features_as_json_and_npy(client, png):
    answer = client.post_image("/features", png).json()
    Features.model_validate(answer)
    row = np.load(io.BytesIO(client.post_image("/features", png, headers={"Accept": "application/x-npy"}).content))
    assert row.shape == (32,) and row.tolist() == answer["features"]


@pytest.mark.parametrize(
    ("path", "status", "code"),
    [
        ("/predict?mpp=7", 422, "mpp_out_of_range"),
        ("/predict?mpp=nan", 422, "mpp_out_of_range"),
        ("/predict?mpp=much", 422, "invalid_parameter"),
        ("/predict?tat=true", 422, "invalid_parameter"),
        ("/predict?coverage=0.9", 422, "coverage_unavailable"),
        ("/predict?coverage=2", 422, "invalid_parameter"),
        ("/predict/batch?coverage=0.9", 422, "coverage_unavailable"),
        ("/predict/batch?mpp=50", 422, "mpp_out_of_range"),
        ("/predict?mpp=0.495&mpp=0.25", 422, "invalid_parameter"),
        ("/features?mpp=7", 422, "mpp_out_of_range"),
        ("/predict?mpp=0.1", 422, "field_too_small"),
        ("/attention?target=tumor", 422, "unknown_target"),
        ("/attention?method=attention&target=Nerve", 422, "unknown_target"),
        ("/attention?method=attention&layer=2", 422, "layer_out_of_range"),
        ("/attention?method=attention&head=2", 422, "layer_out_of_range"),
        ("/attention?method=attention&head=all", 422, "invalid_parameter"),
        ("/attention?method=occlusion&masks=50", 422, "invalid_parameter"),
        ("/attention?method=occlusion&tta=true", 422, "unsuitable_options"),
        ("/attention?method=rollout&layout=heads", 422, "unsuitable_options"),
        ("/attention?method=evidence&layer=0", 422, "unsuitable_options"),
        ("/attention?method=gradcam", 422, "invalid_parameter"),
        ("/attention?colormap=jet", 422, "invalid_parameter"),
        ("/attention?alpha=2", 422, "invalid_parameter"),
        ("/attention?format=gif", 422, "invalid_parameter"),
        ("/features?format=png", 422, "invalid_parameter"),
        ("/nothing", 404, "not_found"),
        ("/predict/", 404, "not_found"),
    ],
)
def test_options_that_cannot_be_followed(client, png, path, status, code):
    response = client.post_image(path, png)
    assert (response.status_code, response.json()["code"]) == (status, code)
    assert response.headers["content-type"] == PROBLEM
    assert response.json()["status"] == status and response.json()["detail"]


def test_the_wrong_parameter_is_named_and_its_value_not_repeated(client, png):
    answer = client.post_image("/predict?mpp=Patient-Meyer", png)
    assert answer.json()["errors"][0]["parameter"] == "mpp"
    assert "Meyer" not in answer.text


@pytest.mark.parametrize(
    ("path", "code"),
    [
        ("/predict?mpp=7", "mpp_out_of_range"),
        ("/features?mpp=7", "mpp_out_of_range"),
        ("/predict/batch?coverage=0.995", "coverage_unavailable"),
        ("/attention?target=Nerve", "unknown_target"),
        ("/attention?layer=99", "layer_out_of_range"),
    ],
)
def test_what_fits_no_picture_is_refused_before_any_is_read(client, path, code):
    response = client.post(path, content=b"no picture", headers={"content-type": "text/plain"})
    assert response.json()["code"] == code


def test_a_parameter_given_twice_is_named(client, png):
    answer = client.post_image("/predict?mpp=0.495&mpp=0.25", png).json()
    assert answer["detail"] == "mpp: this parameter is given more than once; which one is meant?"


def test_a_misspelt_parameter_is_said_to_be_unknown(client, png):
    answer = client.post_image("/predict?mmp=0.5", png).json()
    assert answer["detail"] == "mmp: this route has no such parameter; /docs shows all there are"


def test_images_that_cannot_be_judged(client, png):
    animated = io.BytesIO()
    frames = [Image.fromarray(draw_tile(kind, 1)) for kind in range(2)]
    frames[0].save(animated, "TIFF", save_all=True, append_images=frames[1:])
    cases = [
        (b"rubbish", 415, "unsupported_format"),
        (png[: len(png) // 2], 422, "undecodable_image"),
        (animated.getvalue(), 422, "animated_image"),
        (encode(draw_tile(1, 1)[:20]), 422, "image_too_small"),
        (encode(np.zeros((32, 1000, 3), np.uint8)), 422, "image_too_narrow"),
        (encode(np.zeros((8000, 8000), bool)), 413, "image_too_large"),
        (b"", 400, "no_image"),
    ]
    for data, status, code in cases:
        response = client.post_image("/predict", data)
        assert (response.status_code, response.json()["code"]) == (status, code)


def test_a_wrong_method_names_the_right_one(client):
    response = client.get("/predict")
    assert (response.status_code, response.json()["code"]) == (405, "method_not_allowed")
    assert response.headers["allow"] == "POST" and response.headers["content-type"] == PROBLEM


def test_the_model_card(client):
    card = client.get("/model").json()
    ModelCard.model_validate(card)
    assert [entry["name"] for entry in card["classes"]] == list(SHIPPED_KINDS)
    assert (card["device"], card["precision"], card["tile_px"]) == ("cpu", "fp32", 150)
    assert card["maps"]["default"] == "evidence"
    assert card["service"]["max_images"] == 64 and card["service"]["max_body_bytes"] == 32 << 20
    assert card["service"]["version"] == version("tissue")


@pytest.mark.parametrize("path", ["/", "/model", "/healthz", "/readyz", "/metrics"])
def test_a_monitor_may_ask_for_the_head_alone(client, path):
    assert client.request("HEAD", path).status_code == 200


def test_alive_and_ready(client):
    assert client.get("/healthz").json() == {"status": "alive"}
    assert client.get("/readyz").json()["device"] == "cpu"


def test_not_ready_while_the_model_fails(tiny_artifact, png):
    with open_client(artifact=tiny_artifact) as client:
        batcher = client.app.state.service.batcher
        batcher._run = None  # every call fails from here on, as on a lost GPU
        assert client.post_image("/predict", png).status_code == 500
        response = client.get("/readyz")
        assert response.status_code == 503 and response.json()["code"] == "not_ready"


def test_no_new_work_and_not_ready_while_stopping(tiny_artifact, png):
    with open_client(artifact=tiny_artifact) as client:
        client.app.state.service.batcher.refuse()
        for response in (client.post_image("/predict", png), client.get("/readyz")):
            assert (response.status_code, response.json()["code"]) == (503, "shutting_down")
            assert int(response.headers["retry-after"]) >= 1 and response.headers["connection"] == "close"
        assert client.get("/healthz").status_code == 200


@pytest.mark.parametrize("path", ["/predict", "/predict?tta=true", "/attention", "/features"])
def test_no_picture_outlives_its_request(client, png, path):
    """Not even until garbage is collected, which takes no notice of how large a picture is."""
    flat = encode(np.full((1000, 1000, 3), 255, np.uint8))
    assert len(flat) < SMALL_BYTES
    gc.collect()
    gc.disable()
    try:
        statuses = [client.post_image(path, image).status_code for image in (flat, png, png[:2000], b"rubbish")]
        left = [one for one in gc.get_objects() if type(one) is Picture]
    finally:
        gc.enable()
    assert statuses == [200, 200, 422, 415]
    assert not left


def test_metrics_count_what_happened(tiny_artifact, png):
    with open_client(artifact=tiny_artifact) as client:
        label = client.post_image("/predict?tta=true", png).json()["label"]
        client.post_image("/predict", b"rubbish")
        client.get("/no/such/path")
        client.get("/static/no-such-file.js")
        client.get("/openapi.json")
        text = client.get("/metrics").text
    for line in (
        'tissue_requests_total{method="POST",route="/predict",status="200"} 1.0',
        'tissue_requests_total{method="POST",route="/predict",status="415"} 1.0',
        'tissue_requests_total{method="GET",route="none",status="404"} 1.0',
        'tissue_requests_total{method="GET",route="/static/",status="404"} 1.0',
        'tissue_requests_total{method="GET",route="/openapi.json",status="200"} 1.0',
        'tissue_problems_total{code="unsupported_format"} 1.0',
        'tissue_stage_seconds_count{stage="decode"} 2.0',
        'tissue_stage_seconds_count{stage="infer"} 1.0',
        'tissue_model_call_tiles_sum{graph="predict"} 8.0',
        'tissue_model_call_tiles_count{graph="predict"} 8.0',
        "tissue_requests_in_progress 1.0",
        "tissue_queue_tiles 0.0",
    ):
        assert line in text.splitlines(), line
    assert f'label="{label}"' in text and 'device="cpu"' in text


def test_two_services_in_one_process_count_apart():
    first, second = Metrics(), Metrics()
    first.problems.labels("x").inc()
    assert b'code="x"' in first.expose() and b'code="x"' not in second.expose()


def test_logs_hold_no_names_and_no_pictures(client, png, caplog):
    caplog.set_level("DEBUG")
    post_form(client, "/predict?mpp=0.495", ("Meyer_1950-01-01.png", png))
    post_form(client, "/predict/batch", ("Meyer.png", png), ("Meyer.png", b"Meyer"), field="files")
    client.get("/Meyer")
    ours = [record for record in caplog.records if record.name != "httpx"]  # the client's own
    assert len([record for record in ours if record.name == "tissue.access"]) == 3
    assert not any("Meyer" in str(vars(record)) for record in ours)


# -- a network without attention -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tokenless(tokenless_artifact):
    with open_client(artifact=tokenless_artifact) as client:
        yield client


@pytest.mark.parametrize("method", ["attention", "rollout"])
def test_a_map_that_the_network_has_not_is_refused_with_those_it_has(tokenless, png, method):
    response = tokenless.post_image(f"/attention?method={method}", png)
    assert response.status_code == 422
    problem = response.json()
    assert problem["code"] == "method_unavailable"
    assert f"(resnet) has no {method}" in problem["detail"] and "evidence, occlusion" in problem["detail"]


@pytest.mark.parametrize("options", ["", "?method=evidence&tta=true", "?method=occlusion&masks=25"])
def test_its_other_maps_are_given(tokenless, png, options):
    answer = tokenless.post_image(f"/attention{options}", png).json()
    assert answer["method"] in ("evidence", "occlusion")
    assert np.shape(answer["grid"]) == (10, 10) and answer["class_specific"] and answer["signed"]


def test_its_card_says_which_maps_there_are(tokenless, png):
    assert tokenless.get("/model").json()["maps"]["methods"] == ["evidence", "occlusion"]
    layer = tokenless.post_image("/attention?layer=0", png)
    assert layer.status_code == 422 and "(resnet) has no attention" in layer.json()["detail"]
