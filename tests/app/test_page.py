"""The page for people in a real Chromium, against the real service with the shipped artefact."""

import base64
import csv
import io
import json
import os
import re
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image

from app.client import SUFFIXES
from app.colormaps import TABLES
from app.export import list_columns
from app.settings import SHIPPED_ARTIFACT
from model.pixels import decode
from tests.app.chromium import NEEDS_CHROMIUM, Visit
from tests.app.chromium import browser as browser
from tests.app.conftest import PATIENCE_S, encode, start
from training.synthetic import SHIPPED_KINDS, draw_tile

pytestmark = NEEDS_CHROMIUM

HOSTILE = "<img src=x onerror=alert(1)>.png"
FORMULA = '=HYPERLINK("x";"y"),.png'

# What every request to the model cost and when it was made, by the page's own clock.
WATCH_CALLS = """
window.calls = [];
const bare = window.fetch;
window.fetch = async (address, options) => {
  const call = {address: String(address), start: performance.now(), key: options?.headers?.["X-API-Key"]};
  calls.push(call);
  const response = await bare(address, options);
  Object.assign(call, {end: performance.now(), status: response.status,
                       retryAfter: Number(response.headers.get("Retry-After"))});
  return response;
};
"""
MAKE_TRANSFER = """(files) => {
  const transfer = new DataTransfer();
  for (const {name, data} of files) {
    const bytes = Uint8Array.from(atob(data), (letter) => letter.charCodeAt(0));
    transfer.items.add(new File([bytes], name, {type: "image/png"}));
  }
  return transfer;
}"""

HOLD_PICTURES = """() => {
  const decode = window.createImageBitmap;
  const gate = new Promise((open) => { window.letPicturesThrough = open; });
  window.createImageBitmap = (...given) => gate.then(() => decode(...given));
}"""


@pytest.fixture(scope="module")
def tiles() -> list[bytes]:
    return [encode(draw_tile(kind, 5)) for kind in SHIPPED_KINDS]


@pytest.fixture(scope="module")
def service() -> Iterator[str]:
    with start(artifact=SHIPPED_ARTIFACT) as process:
        yield process.url


Open = Callable[..., Visit]


@pytest.fixture
def open_page(browser, service) -> Iterator[Open]:
    contexts = []

    def open_page(url: str = service, **options: Any) -> Visit:
        context = browser.new_context(**{"viewport": {"width": 1300, "height": 1000}} | options)
        contexts.append(context)
        context.add_init_script(WATCH_CALLS)
        visit = Visit(context, url)
        visit.page.set_default_timeout(4 * PATIENCE_S * 1000)  # two hundred tiles on a busy machine
        visit.open("/")
        return visit

    yield open_page
    for context in contexts:
        context.close()


def give(page: Any, *files: tuple[str, bytes]) -> None:
    """As if chosen, without the dialog of the system."""
    page.locator("#files").set_input_files(
        [{"name": name, "mimeType": "image/png", "buffer": data} for name, data in files]
    )


def drop(page: Any, *files: tuple[str, bytes]) -> None:
    listed = [{"name": name, "data": base64.b64encode(data).decode()} for name, data in files]
    transfer = page.evaluate_handle(MAKE_TRANSFER, listed)
    for event in ("dragenter", "dragover", "drop"):
        page.dispatch_event("main", event, {"dataTransfer": transfer})


def drop_paths(page: Any, *paths: Path) -> None:
    """From the file manager, which alone can drop folders."""
    session = page.context.new_cdp_session(page)
    data = {"items": [], "files": [str(path) for path in paths], "dragOperationsMask": 1}
    for kind in ("dragEnter", "dragOver", "drop"):
        session.send("Input.dispatchDragEvent", {"type": kind, "x": 50, "y": 300, "data": data})


def hold(page: Any, address: str) -> list[Any]:
    """Requests to such an address, which from now on wait to be let through."""
    held: list[Any] = []
    page.context.route(re.compile(address), lambda route: held.append(route))
    return held


def let_through(page: Any, held: list[Any]) -> None:
    """The first that is held, as soon as there is one."""
    for _ in range(50 * PATIENCE_S):
        if held:
            break
        page.wait_for_timeout(20)
    held.pop(0).continue_()


def wait_until_done(page: Any, count: int) -> None:
    page.locator(f"#progress[data-done=true] #progress-text:text-matches('of {count} tile')").wait_for()


def wait_for_map(page: Any, method: str = "") -> None:
    page.locator("#viewer[aria-busy=false] #scale:not(.empty)").wait_for()
    page.locator(f'#map[aria-label^="Map of {method}"]').wait_for()


def look(page: Any) -> str:
    return str(page.locator("#map").evaluate("canvas => canvas.toDataURL()"))


def count_calls(page: Any) -> int:
    return int(page.evaluate("calls.length"))


def ask(url: str, path: str, image: bytes, **options: str | int) -> Any:
    headers = {"Content-Type": "image/png"}
    answer = httpx.post(url + path, content=image, params=options, headers=headers, timeout=PATIENCE_S)
    return answer.raise_for_status().json()


def test_a_dropped_tile_is_named_as_the_service_names_it(open_page, service, tiles):
    visit = open_page()
    page = visit.page
    drop(page, (HOSTILE, tiles[0]))
    wait_until_done(page, 1)
    answer = ask(service, "/predict", tiles[0])

    shown = page.locator("#tile-label").inner_text()
    assert shown == f"{answer['label']} {answer['confidence']:.0%}".replace("%", " %")
    assert page.locator("#bars tbody tr").count() == 6
    assert page.locator("#bars tr.inside th").all_inner_texts() == answer["prediction_set"]["labels"]
    assert "90 %" in page.locator("#set").inner_text()
    for remark in (*answer["reasons"], *answer["warnings"]):
        assert remark["text"].rstrip(".") in page.locator("#verdict").inner_text()
    page.locator(".facts summary").click()
    facts = page.locator("#facts").inner_text()
    assert answer["input"]["sha256"] in facts and "Sharpness" in facts

    # The name is text and stays here.
    assert page.locator("#tile-file").inner_text() == HOSTILE
    assert page.locator("img[src=x]").count() == 0
    visit.check()


def test_the_map_follows_method_class_and_patch(open_page, service, tiles):
    visit = open_page()
    page = visit.page
    give(page, ("tile.png", tiles[2]))
    wait_for_map(page)
    page.get_by_role("radio", name="Evidence").check()
    wait_for_map(page, "evidence")
    seen = {look(page)}

    page.locator("#target").select_option("Lympho")
    wait_for_map(page, "evidence for Lympho")
    seen.add(look(page))
    page.get_by_role("radio", name="Occlusion").check()
    wait_for_map(page, "occlusion for Lympho")
    seen.add(look(page))
    page.get_by_role("radio", name="Attention").check()
    wait_for_map(page, "attention")
    seen.add(look(page))
    assert "where information was routed, not why" in page.locator("#map-words").inner_text()
    assert not page.locator("#target").is_visible()
    page.locator("#layer").select_option("1")
    page.locator("#head").select_option("2")
    page.locator("#map-words:text-matches('layer 1 .*head 2')").wait_for()
    seen.add(look(page))
    assert len(seen) == 5

    # The number under the pointer is the service's, and colours and opacity cost no request.
    grid = ask(service, "/attention", tiles[2], method="attention", layer=1, head=2)["grid"]
    asked = count_calls(page)
    place = page.locator("#map").bounding_box()
    page.mouse.move(place["x"] + 0.65 * place["width"], place["y"] + 0.25 * place["height"])
    readout = page.locator("#readout").inner_text()
    assert readout.startswith("Row 3, column 7: ")
    assert float(readout.split(": ")[1].split(",")[0]) == pytest.approx(grid[2][6], rel=0.01)
    page.mouse.move(0, 0)
    page.locator("#colormap").select_option("magma")
    seen.add(look(page))
    page.locator("#alpha").fill("20")
    seen.add(look(page))
    page.get_by_role("button", name="Overlay").click()
    assert not page.locator("#picture").is_visible() and page.locator("#map").is_visible()
    assert len(seen) == 7 and count_calls(page) == asked
    assert "even" in page.locator("#scale-ticks").inner_text()
    visit.check()


def test_colours_are_those_of_the_services_pictures(open_page):
    tables = open_page().page.evaluate(
        """import("./static/page/colours.js").then(({TABLES}) =>
           Object.fromEntries(Object.entries(TABLES).map(([name, table]) => [name, [...table]])))"""
    )
    assert {name: np.reshape(table, (256, 3)).tolist() for name, table in tables.items()} == {
        name: table.tolist() for name, table in TABLES.items()
    }


def test_a_smooth_map_is_the_one_of_the_services_pictures(open_page, service, tiles):
    visit = open_page()
    page = visit.page
    grid = np.array(ask(service, "/attention", tiles[2], method="evidence")["grid"], np.float32)
    enlarged = page.evaluate(
        """(grid) => import("./static/page/smooth.js").then(({enlarge}) => enlarge(grid, 150))""", grid.tolist()
    )
    expected = np.asarray(Image.fromarray(grid).resize((150, 150), Image.Resampling.BICUBIC))
    np.testing.assert_allclose(enlarged, expected.clip(grid.min(), grid.max()), atol=1e-5 * np.abs(grid).max())

    give(page, ("tile.png", tiles[2]))
    wait_for_map(page)
    patches, asked = look(page), count_calls(page)
    page.locator("#form").select_option("smooth")
    assert look(page) != patches and count_calls(page) == asked
    assert "Smoothed between the patches" in page.locator("#map-words").inner_text()
    visit.check()


def test_all_heads_are_shown_and_one_can_be_chosen(open_page, service, tiles):
    visit = open_page()
    page = visit.page
    card = httpx.get(service + "/model", timeout=PATIENCE_S).json()
    give(page, ("one.png", tiles[2]), ("two.png", tiles[3]))
    wait_for_map(page)
    assert not page.locator("#heads").is_visible()
    page.get_by_role("radio", name="Attention").check()
    wait_for_map(page, "attention")
    page.locator("#heads summary").click()
    buttons = page.locator("#heads-grid button")
    page.locator("#heads-grid[aria-busy=false]").wait_for()
    assert buttons.count() == card["layers"] * (card["heads"] + 1)
    pressed = page.locator("#heads-grid [aria-pressed=true]")
    assert pressed.get_attribute("aria-label") == f"Layer {card['layers'] - 1}, mean of all heads"
    asked = count_calls(page)
    page.get_by_role("button", name="Layer 1, head 0").press("Enter")
    page.locator("#map-words:text-matches('layer 1 .*head 0')").wait_for()
    assert page.locator("#heads-grid [aria-pressed=true]:focus").get_attribute("aria-label") == "Layer 1, head 0"
    assert (page.locator("#layer").input_value(), page.locator("#head").input_value()) == ("1", "0")
    assert count_calls(page) == asked + 1

    # Another tile has others, in the colours that are chosen; only one that is looked at is asked about.
    before = buttons.last.locator("canvas").evaluate("canvas => canvas.toDataURL()")
    with page.expect_response(re.compile("layout=heads")):
        page.locator("#gallery [aria-selected=false]").click()
    page.locator("#heads-grid[aria-busy=false]").wait_for()
    assert buttons.last.locator("canvas").evaluate("canvas => canvas.toDataURL()") != before
    page.locator("#colormap").select_option("magma")
    page.get_by_role("radio", name="Evidence").check()
    assert not page.locator("#heads").is_visible()
    assert sum("layout=heads" in call["address"] for call in page.evaluate("calls")) == 2
    visit.check()


def test_heads_are_never_those_of_the_tile_before(open_page, tiles):
    visit = open_page()
    page = visit.page
    give(page, ("one.png", tiles[2]), ("two.png", tiles[3]))
    page.get_by_role("radio", name="Attention").check()
    page.locator("#heads summary").click()
    heads = page.locator("#heads-grid table")
    heads.wait_for()
    page.evaluate(HOLD_PICTURES)
    held = hold(page, "layout=heads")
    page.locator("#gallery [aria-selected=false]").click()
    heads.wait_for(state="hidden")
    page.evaluate("letPicturesThrough()")
    page.get_by_text("Asking for all of them").wait_for()
    assert not heads.is_visible()
    let_through(page, held)
    heads.wait_for()
    visit.check()


def test_a_map_that_comes_late_is_not_drawn_over_another_tile(open_page, tiles):
    visit = open_page()
    page = visit.page
    maps = hold(page, "attention")
    give(page, ("one.png", tiles[0]))
    page.get_by_text("Asking for the map").wait_for()
    predictions = hold(page, "predict")
    give(page, ("two.png", tiles[3]))
    page.locator("#gallery [aria-selected=false]").click()
    page.locator("#tile-file:text-is('two.png')").wait_for()
    let_through(page, maps)
    let_through(page, predictions)
    page.get_by_text("Asking for the map").wait_for()
    assert page.locator("#map").get_attribute("aria-label") == "Map"
    let_through(page, maps)
    wait_for_map(page)
    visit.check()


def test_a_picture_that_is_read_late_asks_for_no_map_of_another_tile(open_page, tiles):
    visit = open_page()
    page = visit.page
    page.evaluate(HOLD_PICTURES)
    give(page, ("one.png", tiles[0]))
    wait_until_done(page, 1)
    predictions = hold(page, "predict")
    give(page, ("two.png", tiles[3]))
    page.locator("#gallery [aria-selected=false]").click()
    page.locator("#tile-file:text-is('two.png')").wait_for()
    page.evaluate("letPicturesThrough()")
    is_drawn = "document.querySelector('#picture').getContext('2d').getImageData(99, 99, 1, 1).data[3] > 0"
    page.wait_for_function(is_drawn)
    assert sum("attention" in call["address"] for call in page.evaluate("calls")) == 1, "of the first tile alone"
    let_through(page, predictions)
    wait_for_map(page)
    visit.check()


def test_tiles_can_be_removed_while_a_picture_is_read(open_page, tiles):
    visit = open_page()
    page = visit.page
    page.evaluate(HOLD_PICTURES)
    give(page, ("one.png", tiles[0]))
    wait_until_done(page, 1)
    page.get_by_role("button", name="Remove all").click()
    page.locator("#results").wait_for(state="hidden")
    page.evaluate("letPicturesThrough()")
    give(page, ("two.png", tiles[1]))
    wait_for_map(page)
    visit.check()


@pytest.mark.parametrize(("form", "upsample"), [("patches", "nearest"), ("smooth", "bicubic")])
def test_a_map_is_saved_as_the_service_draws_it(open_page, service, tiles, tmp_path, form, upsample):
    visit = open_page()
    page = visit.page
    give(page, ("slide 7.B.tiff", tiles[2]))
    wait_until_done(page, 1)
    page.locator("#tile-mpp").fill("0.5")
    page.get_by_role("button", name="Use for this tile").click()
    page.get_by_role("radio", name="Attention").check()
    page.locator("#layer").select_option("1")
    page.locator("#head").select_option("0")
    page.locator("#colormap").select_option("magma")
    page.locator("#form").select_option(form)
    page.locator("#alpha").fill("20")
    page.locator("#map-words:text-matches('layer 1 .*head 0')").wait_for()
    with page.expect_download() as download:
        page.get_by_role("button", name="Save picture").click()
    assert download.value.suggested_filename == "slide 7.B-attention.png"
    page.get_by_text("Saved as slide 7.B-attention.png.").wait_for()
    download.value.save_as(tmp_path / "map.png")
    options = f"mpp=0.5&method=attention&layer=1&head=0&colormap=magma&alpha=0.2&upsample={upsample}&format=png"
    drawn = httpx.post(f"{service}/attention?{options}", content=tiles[2], timeout=PATIENCE_S).raise_for_status()
    assert (tmp_path / "map.png").read_bytes() == drawn.content
    assert not [call for call in page.evaluate("calls") if "slide" in call["address"]]
    visit.check()


def test_a_picture_of_a_map_that_cannot_be_had_is_said_to_be(open_page, tiles):
    visit = open_page()
    page = visit.page
    problem = {"code": "queue_full", "title": "The service is busy", "detail": "so it is", "request_id": "7e57"}
    answers = [
        {"status": 503, "headers": {"Retry-After": "0"}, "json": problem},
        {"status": 504, "json": problem | {"code": "deadline_exceeded", "title": "The answer took too long"}},
        {"status": 200, "content_type": "text/html", "body": "Who are you?"},
    ]
    page.context.route(re.compile("format=png"), lambda route: route.fulfill(**answers.pop(0)))
    give(page, ("tile.png", tiles[0]))
    assert page.locator("#save-map").is_disabled()
    wait_for_map(page)
    save, state = page.get_by_role("button", name="Save picture"), page.locator("#save-state")
    save.click()
    state.get_by_text("tile-evidence.png wasn't saved. The answer took too long: so it is.").wait_for()
    assert state.inner_text().endswith("(Request 7e57)")
    save.click()
    state.get_by_text("The service answered with status 200, which this page can't read").wait_for()
    assert answers == []
    visit.check(refusals={503, 504})


def test_many_tiles_and_broken_files_are_sorted_counted_and_saved(open_page, tiles, tmp_path):
    visit = open_page()
    page = visit.page
    broken = [
        ("notes.txt", b"no image"),
        ("cut.png", tiles[0][:2000]),
        ("small.png", encode(draw_tile(0, 1)[:20, :20])),
    ]
    names = [HOSTILE, FORMULA] + [f"tile{n}.png" for n in range(2, 200)]
    drop(page, *broken, *((name, tiles[n % len(tiles)]) for n, name in enumerate(names)))
    wait_until_done(page, 203)
    assert page.locator("#progress-text").inner_text() == "200 of 203 tiles answered and 3 failed."
    assert page.locator("#gallery [role=option]").count() == 203

    # Each failure says why, in words and with its request id.
    page.get_by_role("button", name="no answer 3").click()
    for failed in page.locator("#gallery [role=option]").all():
        failed.click()
        page.locator(f"#tile-file:text-is('{failed.get_attribute('title')}')").wait_for()
        assert re.search(r"The image .+\..+\nRequest [0-9a-f]{32}", page.locator("#verdict").inner_text(), re.DOTALL)
    page.get_by_role("button", name="no answer 3").click()

    # The table's columns sort; the queue starts with the most doubtful.
    page.get_by_role("button", name="Table").click()
    page.get_by_role("button", name="Doubt").click()
    doubts = [float(text) for text in page.locator("#table td:nth-child(4)").all_inner_texts() if text]
    verdicts = page.locator("#table td:nth-child(5)").all_inner_texts()[:200]
    judged = [doubt for doubt, verdict in zip(doubts, verdicts, strict=True) if verdict != "out of scope"]
    assert len(doubts) == 200 and judged == sorted(judged, reverse=True)
    page.get_by_role("button", name="Doubt").click()
    assert page.locator("#table th[aria-sort=ascending]").inner_text() == "Doubt"

    saved = {}
    for kind in ("CSV", "JSON"):
        with page.expect_download() as download:
            page.get_by_role("button", name=kind).click()
        download.value.save_as(tmp_path / kind)
        saved[kind] = (tmp_path / kind).read_text("utf-8-sig")
    rows = list(csv.DictReader(io.StringIO(saved["CSV"])))
    items = json.loads(saved["JSON"])
    assert len(rows) == len(items) == 203
    assert list(rows[0]) == list_columns(next(item["probabilities"] for item in items if "error" not in item))
    assert saved["CSV"].startswith('"file","status","label",') and '"answered"' in saved["CSV"]
    assert {row["file"] for row in rows} == {"'" + FORMULA, *names, *(name for name, _ in broken)} - {FORMULA}
    for row, item in zip(rows, items, strict=True):
        assert row["file"].removeprefix("'") == item["file"]
        if "error" in item:
            assert (row["status"], row["error_code"]) == ("failed", item["error"]["code"])
        else:
            assert (row["label"], float(row["p_Tumor"])) == (item["label"], item["probabilities"]["Tumor"])
            assert row["model_digest"] == item["model"]["digest"]

    visit.check(refusals={415, 422})


def test_the_keyboard_is_enough(open_page):
    page = open_page().page
    page.on("filechooser", lambda chooser: None)  # from now on none opens for real
    focused = page.locator(":focus")

    def tab_to(target: str) -> None:
        for _ in range(60):
            page.keyboard.press("Tab")
            if focused.evaluate("(element, target) => element.matches(target)", target):
                return
        raise AssertionError(f"{target} is not reached")

    tab_to("#show-card")
    page.keyboard.press("Enter")
    page.locator("#card[open]:has-text('Research and teaching only')").wait_for()
    page.keyboard.press("Escape")
    page.locator("#show-card:focus").wait_for()
    tab_to("#choose")
    with page.expect_file_chooser():
        page.keyboard.press("Enter")
    tab_to("#samples .all")
    page.keyboard.press("Enter")
    wait_until_done(page, 7)
    tab_to("#gallery [role=option]")
    names = set()
    page.keyboard.press("Home")
    for _ in range(7):
        page.locator('#gallery [aria-selected="true"]:focus').wait_for()
        names.add(focused.get_attribute("title"))
        page.keyboard.press("ArrowRight")
    assert len(names) == 7

    wait_for_map(page)
    tab_to("#methods input")
    method = focused.get_attribute("value")
    page.keyboard.press("ArrowRight")
    assert focused.get_attribute("value") != method
    wait_for_map(page, focused.get_attribute("value"))
    tab_to("#map")
    for key in ("ArrowDown", "ArrowDown", "ArrowRight"):
        page.keyboard.press(key)
    assert page.locator("#readout").inner_text().startswith("Row 2, column 2: ")


def test_a_phone_needs_no_scrolling_sideways(open_page, tiles):
    visit = open_page(viewport={"width": 360, "height": 740}, has_touch=True)
    page = visit.page
    width = "document.documentElement.scrollWidth"
    assert page.evaluate(width) == 360
    give(page, ("a-rather-long-name-" * 8 + ".png", tiles[0]), ("two.png", tiles[3]))
    wait_until_done(page, 2)
    page.locator("#gallery [role=option]").last.tap()
    wait_for_map(page)
    assert 0 <= page.locator("#tile").bounding_box()["y"] < 740  # the answer has come into view
    page.get_by_role("radio", name="Attention").check()
    page.locator("#heads summary").click()
    page.locator("#heads-grid[aria-busy=false] table").wait_for()
    inside = page.locator("#tile").evaluate("(tile) => tile.scrollWidth <= tile.clientWidth")
    assert inside, "the grid of heads scrolls by itself"
    page.locator(".facts summary").click()
    assert page.evaluate(width) == 360
    page.get_by_role("button", name="Table").click()
    page.get_by_role("button", name="Model card").click()
    assert page.evaluate(width) == 360
    visit.check()


def test_an_unknown_scale_can_be_given(open_page, tiles):
    page = open_page().page
    drop(page, ("one.png", tiles[0]), ("two.png", tiles[1]))
    wait_until_done(page, 2)
    assert "The scale is unknown" in page.locator("#verdict").inner_text()
    page.locator("#tile-mpp").fill("0.495")
    page.get_by_role("button", name="Use for this tile").click()
    page.locator(".facts summary").click()
    page.get_by_text("0.495 µm per pixel, given with the request").wait_for()
    name = page.locator("#tile-file").inner_text()
    page.locator("#gallery [aria-selected=false]").click()
    page.locator(f"#tile-file:not(:text-is('{name}'))").wait_for()
    page.locator("#tile-mpp").fill("0.5")
    page.get_by_role("button", name="Use for all").click()
    page.get_by_text("0.5 µm per pixel, given with the request").wait_for()
    page.locator("#scale-form").wait_for(state="hidden")
    assert page.locator("#mpp").input_value() == "0.5"


def test_a_scale_that_was_mistyped_can_be_corrected(open_page, tiles):
    page = open_page().page
    drop(page, ("one.png", tiles[0]), ("two.png", tiles[1]))
    wait_until_done(page, 2)
    page.locator(".facts summary").click()
    field, use = page.locator("#tile-mpp"), page.get_by_role("button", name="Use for this tile")

    field.fill("0.1")  # of which the image shows too little: there is no answer
    use.click()
    page.locator("#tile[data-state=failed]").wait_for()
    assert field.input_value() == "0.1"
    field.fill("0.48")
    use.click()
    page.get_by_text("0.48 µm per pixel, given with the request").wait_for()
    assert field.input_value() == "0.48"

    # The other tile has none of its own, and what is said for all is said for both.
    name = page.locator("#tile-file").inner_text()
    page.locator("#gallery [aria-selected=false]").click()
    page.locator(f"#tile-file:not(:text-is('{name}'))").wait_for()
    assert field.input_value() == ""
    page.locator("#mpp").fill("0.5")
    page.locator("#mpp").press("Enter")
    page.get_by_text("0.5 µm per pixel, given with the request").wait_for()
    page.locator(f"#gallery [title='{name}']").click()
    page.locator(f"#tile-file:text-is('{name}')").wait_for()
    page.get_by_text("0.5 µm per pixel, given with the request").wait_for()
    assert not page.locator("#scale-form").is_visible()


def test_an_answer_of_unknown_scale_gets_no_tick(open_page, service):
    """Though the service finds nothing else to doubt."""
    page = open_page().page
    image = (SHIPPED_ARTIFACT / "golden.png").read_bytes()
    assert ask(service, "/predict", image)["verdict"] == "ok"
    drop(page, ("tile.png", image))
    wait_until_done(page, 1)
    verdict = page.locator("#verdict")
    assert verdict.locator("strong").inner_text() == "Within the model's limits, if the scale is right"
    assert verdict.locator(".sign").inner_text() == "?"
    unsure = verdict.evaluate("(box) => getComputedStyle(box).borderLeftColor")
    page.locator("#tile-mpp").fill("0.495")
    page.get_by_role("button", name="Use for this tile").click()
    page.locator("#verdict[data-verdict=ok]").wait_for()
    assert verdict.locator(".sign").inner_text() == "\u2713"
    assert "No reason for doubt was found" in verdict.inner_text()
    assert verdict.evaluate("(box) => getComputedStyle(box).borderLeftColor") != unsure


def test_an_unknown_scale_is_said_in_the_list_too(open_page, tmp_path):
    page = open_page().page
    drop(page, ("tile.png", (SHIPPED_ARTIFACT / "golden.png").read_bytes()))
    wait_until_done(page, 1)
    option = page.locator("#gallery [role=option]")
    assert str(option.get_attribute("aria-label")).endswith("ok, if the scale is right")
    assert option.locator(".mark").inner_text() == "?"
    page.get_by_role("button", name="ok, if the scale is right 1").click()
    page.get_by_role("button", name="Table").click()
    cell = page.locator("#table td:last-child")
    assert cell.inner_text() == "ok, if the scale is right"
    with page.expect_download() as download:
        page.get_by_role("button", name="JSON").click()
    download.value.save_as(tmp_path / "saved")
    assert json.loads((tmp_path / "saved").read_bytes())[0]["verdict"] == "ok"

    page.get_by_role("button", name="Pictures").click()
    page.get_by_role("button", name="ok, if the scale is right 1").click()
    page.locator("#tile-mpp").fill("0.495")
    page.get_by_role("button", name="Use for this tile").click()
    page.locator("#verdict[data-verdict=ok]").wait_for()
    assert str(option.get_attribute("aria-label")).endswith(" %, ok") and option.locator(".mark").count() == 0
    assert not page.locator("#filters [data-verdict=unscaled]").is_visible()


def test_the_queue_goes_by_verdict_and_opens_with_its_first_tile(open_page, service, tiles):
    visit = open_page()
    page = visit.page
    answer = ask(service, "/predict", tiles[0], mpp="0.5")
    unscaled = [{"code": "unknown_scale", "text": "The scale is unknown"}]
    found = [
        {"verdict": "ok", "confidence": 0.4},
        {"verdict": "ok", "confidence": 0.3, "warnings": unscaled},
        {"verdict": "uncertain", "confidence": 0.9, "warnings": unscaled},
        {"verdict": "ok", "confidence": 0.2},
        {"verdict": "uncertain", "confidence": 0.6},
        {"verdict": "out_of_scope", "confidence": 0.97},
    ]
    page.context.route("**/predict", lambda route: route.fulfill(json=answer | found.pop(0)))
    give(page, *((f"{n}.png", tiles[0]) for n in range(len(found))))
    wait_until_done(page, 6)
    options = page.locator("#gallery [role=option]")
    assert [str(option.get_attribute("aria-label")).split(", ", 1)[1] for option in options.all()] == [
        "97 %, out of scope",
        "60 %, uncertain",
        "90 %, uncertain",
        "30 %, ok, if the scale is right",
        "20 %, ok",
        "40 %, ok",
    ]
    assert options.first.get_attribute("aria-selected") == "true"
    assert page.locator("#tile-file").inner_text() == options.first.get_attribute("title")
    page.get_by_role("button", name="Table").click()
    verdicts = page.locator("#table td:last-child")
    shown = verdicts.all_inner_texts()
    page.locator("#table thead").get_by_role("button", name="Verdict").click()
    assert verdicts.all_inner_texts() == shown
    visit.check()


@pytest.mark.parametrize(("touched", "name"), [("#gallery [title='1.png']", "1.png"), ("#tile-file", "0.png")])
def test_a_tile_that_was_opened_meanwhile_stays_open(open_page, service, tiles, touched, name):
    page = open_page().page
    answer = ask(service, "/predict", tiles[0], mpp="0.5")
    found = [{"verdict": "ok"}, {"verdict": "ok"}, {"verdict": "uncertain"}]
    held = hold(page, "predict")
    give(page, *((f"{n}.png", tiles[0]) for n in range(3)))
    page.locator(touched).click()
    while found:
        if held:
            held.pop(0).fulfill(json=answer | found.pop(0))
        page.wait_for_timeout(20)
    wait_until_done(page, 3)
    assert page.locator("#gallery [role=option]").first.get_attribute("title") != name
    assert page.locator("#tile-file").inner_text() == name


def test_a_class_is_named_once(open_page, service, tiles):
    page = open_page().page
    answer = ask(service, "/predict", tiles[0]) | {"label": "Debris"}
    page.context.route("**/predict", lambda route: route.fulfill(json=answer))
    drop(page, ("tile.png", tiles[0]))
    wait_until_done(page, 1)
    assert page.locator("#tile-description").inner_text() == "Necrosis, bleeding, mucus."
    page.get_by_role("button", name="Model card").click()
    assert "Debris necrosis, bleeding, mucus" in page.locator("#card .classes").inner_text()


def test_beside_a_map_stands_how_its_method_was_judged(open_page, service, tiles):
    visit = open_page()
    page = visit.page
    judged = page.locator("#map-judged")
    asked = "which patches the answer rests on {} which patches are of which class."
    drop(page, ("tile.png", tiles[0]))
    wait_for_map(page, "evidence")
    assert judged.inner_text() == f"Judged: better than a map drawn without the model at telling {asked.format('and')}"
    page.get_by_role("radio", name="Attention").check()
    wait_for_map(page, "attention")
    worse = "Judged (last layer, mean of all heads): no better than a map drawn without the model at telling "
    assert judged.inner_text() == worse + asked.format("or")

    maps = httpx.get(service + "/model", timeout=PATIENCE_S).json()["maps"]
    for score in maps["judged"]["scores"]:
        if (score["map"], score["metric"]) == ("occlusion", "removal"):
            score["low"] = 0  # the interval now meets those of maps that no model drew
    told = page.evaluate(
        """(cards) => import("./static/page/captions.js").then(({tellJudgement}) =>
             cards.map((card) => tellJudgement({method: "occlusion"}, card)))""",
        [{"maps": maps}, {"maps": maps | {"judged": None}}],
    )
    half = "better than a map drawn without the model at telling which patches are of which class"
    assert told == [f"Judged (25 groups): {half}, but no better at telling which patches the answer rests on.", ""]
    visit.check()


@pytest.mark.parametrize(
    ("probabilities", "labels", "is_said"),
    [
        ({"Tumor": 0.8, "Stroma": 0.12, "Complex": 0.08}, ["Tumor", "Complex"], True),
        ({"Tumor": 0.8, "Stroma": 0.12, "Complex": 0.08}, ["Tumor", "Stroma"], False),
    ],
)
def test_a_set_that_leaves_a_likelier_class_out_says_why(open_page, service, tiles, probabilities, labels, is_said):
    page = open_page().page
    answer = ask(service, "/predict", tiles[0])
    answer |= {"label": "Tumor", "confidence": 0.8, "probabilities": probabilities}
    answer["prediction_set"] = {"labels": labels, "coverage": 0.9}
    page.context.route("**/predict", lambda route: route.fulfill(json=answer))
    drop(page, ("tile.png", tiles[0]))
    wait_until_done(page, 1)
    assert ("Each class has a threshold of its own" in page.locator("#set").inner_text()) == is_said


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ((0.5, -0.25), "Most for Tumor in row 1, column 1: +0.5; most against it in row 10, column 10: \u22120.25."),
        (
            (-0.25, -0.5),
            "Nothing speaks for Tumor; least against it in row 1, column 1: \u22120.25; "
            "most against it in row 10, column 10: \u22120.5.",
        ),
        (
            (0.5, 0.25),
            "Most for Tumor in row 1, column 1: +0.5; nothing against it; least for it in row 10, column 10: +0.25.",
        ),
        ((0.0001, -0.0001), "Nothing here speaks for or against Tumor."),
    ],
)
def test_the_ends_of_a_signed_map_are_called_what_they_are(open_page, service, tiles, values, said):
    high, low = values
    grid = np.full((10, 10), (high + low) / 2)
    grid[0, 0], grid[9, 9] = high, low
    answer = ask(service, "/attention", tiles[0], method="occlusion", target="Tumor", format="json")
    page = open_page().page
    page.context.route(re.compile("attention"), lambda route: route.fulfill(json=answer | {"grid": grid.tolist()}))
    drop(page, ("tile.png", tiles[0]))
    wait_for_map(page)
    assert page.locator("#readout").inner_text() == f"{said} Point at a patch to read it."


def test_a_model_card_compares_with_machines_alone(open_page, service):
    """Not with the accuracy of a bin of answers, which stands under a protocol of its own."""
    page = open_page().page
    page.get_by_role("button", name="Model card").click()
    metrics = httpx.get(service + "/model", timeout=PATIENCE_S).json()["metrics"]
    protocol = metrics[0]["protocol"]
    baselines = [m for m in metrics if m["protocol"] == protocol and m["name"].startswith("accuracy of ")]
    best = max(baselines, key=lambda baseline: baseline["value"])["name"].removeprefix("accuracy of ")
    assert f"best baseline without a network ({best})" in page.locator("#card summary").first.inner_text()


def test_few_tiles_are_not_stretched_to_fill_the_list(open_page, tiles):
    page = open_page().page
    drop(page, ("tile.png", tiles[0]))
    wait_until_done(page, 1)
    place = page.locator("#gallery [role=option]").bounding_box()
    assert place["height"] < 1.5 * place["width"]


def test_settings_ask_for_everything_again(open_page, tiles):
    page = open_page().page
    drop(page, ("one.png", tiles[0]), ("two.png", tiles[1]))
    wait_until_done(page, 2)
    asked = count_calls(page)
    page.locator("#coverage").select_option("0.99")
    page.locator("#set:has-text('99 %')").wait_for()
    page.get_by_label("Eight orientations").check()
    page.locator("#verdict:has-text('Turned and mirrored 8 ways')").wait_for()
    wait_until_done(page, 2)
    calls = [call["address"] for call in page.evaluate("calls")[asked:] if call["address"].startswith("predict")]
    assert sum("coverage=0.99" in address for address in calls) == 4 and sum("tta=true" in a for a in calls) == 2


def test_a_pasted_image_is_asked_about(open_page, tiles):
    page = open_page().page
    transfer = page.evaluate_handle(MAKE_TRANSFER, [{"name": "", "data": base64.b64encode(tiles[0]).decode()}])
    page.evaluate(
        """(transfer) => document.dispatchEvent(
           new ClipboardEvent("paste", {clipboardData: transfer, bubbles: true, cancelable: true}))""",
        transfer,
    )
    wait_until_done(page, 1)
    assert page.locator("#tile-file").inner_text() == "pasted 1"


def test_of_a_folder_the_images_are_taken_and_what_is_lost_is_counted(open_page, tiles, tmp_path):
    visit = open_page()
    page = visit.page
    folder = tmp_path / "slide 7"
    (folder / "deeper").mkdir(parents=True)
    images = [folder / "deeper" / f"tile{suffix}" for suffix in SUFFIXES] + [folder / "TILE.PNG"]
    lost = folder / os.fsdecode(b"no UTF-8 \xff.png")  # which no page can read
    others = [folder / name for name in (".hidden.png", "Thumbs.db", "notes.txt", "png")]
    for path in (*images, *others, lost):
        path.write_bytes(tiles[0])
    drop_paths(page, folder)
    wait_until_done(page, len(images))
    remark = page.locator("#intake-remark")
    assert remark.inner_text() == "1 file or folder couldn't be read."
    titles = [option.get_attribute("title") for option in page.locator("#gallery [role=option]").all()]
    assert sorted(titles) == sorted(path.name for path in images)

    # What is dropped by itself is asked about whatever it is called.
    drop_paths(page, folder / "notes.txt")
    wait_until_done(page, len(images) + 1)
    assert not remark.is_visible()
    for path in (*images, lost):
        path.unlink()
    drop_paths(page, folder)
    page.get_by_text("No images there").wait_for()
    visit.check()


def test_a_busy_service_is_asked_again_when_it_says(open_page, tiles):
    with start(artifact=SHIPPED_ARTIFACT, max_queue=1, infer_threads=1, deadline_ms=4000) as process:
        visit = open_page(process.url)
        page = visit.page
        drop(page, *((f"{n}.png", tiles[n % len(tiles)]) for n in range(12)))
        page.locator("#progress-note:has-text('The service is busy: going on in')").wait_for()
        page.get_by_role("button", name="Cancel the rest").click()
        wait_until_done(page, 12)
        assert "cancelled" in page.locator("#progress-text").inner_text()
        page.get_by_role("button", name="Ask again for the rest").click()
        page.locator("#progress-text:has-text('12 of 12 tiles answered.')").wait_for()

        calls = [call for call in page.evaluate("calls") if call["address"].startswith("predict") and "end" in call]
        refused = [call for call in calls if call["status"] == 503]
        assert refused
        cancelled = max(call["end"] for call in refused[:4])  # asking again by hand doesn't wait
        for refusal in refused[4:]:
            too_early = [
                call
                for call in calls
                if max(refusal["end"], cancelled) < call["start"] < refusal["end"] + 1000 * refusal["retryAfter"] - 20
            ]
            assert not too_early
        wait_for_map(page)
        visit.check(refusals={503})


def test_an_unreachable_service_is_asked_again(open_page, tiles):
    page = open_page().page
    page.context.set_offline(True)
    drop(page, ("one.png", tiles[0]))
    page.locator('#progress-note:has-text("The service can\'t be reached")').wait_for()
    page.context.set_offline(False)
    page.locator("#progress-text:has-text('1 of 1 tile answered.')").wait_for()


def test_a_key_is_asked_for_and_kept_for_the_tab(open_page, tiles):
    with start(artifact=SHIPPED_ARTIFACT, api_keys="sesame", max_body_mib=0.01) as process:
        visit = open_page(process.url)
        page = visit.page
        page.locator("#key[open]").wait_for()
        page.locator("#key-value").fill("wrong")
        page.keyboard.press("Enter")
        page.get_by_text("The service doesn't know this key.").wait_for()
        page.locator("#key-value").fill("sesame")
        page.keyboard.press("Enter")
        page.locator("#key").wait_for(state="hidden")

        small = encode(draw_tile(0, 5), "JPEG", quality=80)
        drop(page, ("small.jpg", small), ("large.png", tiles[0]))
        wait_until_done(page, 2)
        page.locator("#gallery [data-state=failed]").click()
        page.locator("#tile[data-state=failed]").wait_for()
        assert "The request is too large" in page.locator("#verdict").inner_text()
        assert not [call for call in page.evaluate("calls") if "sesame" in call["address"]]

        assert page.evaluate("[sessionStorage.length, localStorage.length, document.cookie]") == [1, 0, ""]
        page.reload()
        page.locator("#knows:has-text('Tumor')").wait_for()
        assert not page.locator("#key").is_visible()
        page.get_by_role("button", name="Forget the key").click()
        drop(page, ("small.jpg", small))
        page.locator("#key[open]").wait_for()
        page.locator("#key-value").fill("sesame")
        page.keyboard.press("Enter")
        page.locator("#progress-text:has-text('1 of 1 tile answered.')").wait_for()
        visit.check(refusals={401, 413})


def test_a_key_may_have_any_letters(open_page, tiles):
    with start(artifact=SHIPPED_ARTIFACT, api_keys="сезам-開け") as process:
        visit = open_page(process.url)
        page = visit.page
        page.locator("#key-value").fill("сезам-開け")
        page.keyboard.press("Enter")
        page.locator("#key").wait_for(state="hidden")
        give(page, ("tile.png", tiles[0]))
        wait_for_map(page)
        with page.expect_download():
            page.get_by_role("button", name="Save picture").click()
        visit.check(refusals={401})


def test_a_model_without_sets_or_metrics_is_shown_as_such(open_page, server, tiles):
    visit = open_page(server.url)
    page = visit.page
    assert not page.locator("#coverage").is_visible()
    drop(page, ("tile.png", tiles[0]))
    wait_for_map(page)
    assert "no measured sets" in page.locator("#set").inner_text()
    page.get_by_role("button", name="Model card").click()
    assert "Nothing was measured" in page.locator("#card").inner_text()
    visit.check()


@pytest.mark.parametrize(
    ("status", "code", "title"),
    [
        (422, "layer_out_of_range", "There is no such layer or head"),
        (504, "deadline_exceeded", "The answer took too long"),
    ],
)
def test_a_map_that_is_refused_is_said_to_be(open_page, tiles, status, code, title):
    """As by a network without attention: the other methods stay."""
    visit = open_page()
    page = visit.page
    problem = {"status": status, "code": code, "title": title, "detail": "so it is", "request_id": "7e57"}
    page.context.route(
        re.compile("method=attention"),
        lambda route: route.fulfill(status=status, content_type="application/problem+json", body=json.dumps(problem)),
    )
    drop(page, ("tile.png", tiles[0]))
    wait_for_map(page)
    page.get_by_role("radio", name="Attention").check()
    state = page.locator(f"#map-state:has-text('{title}: so it is.')")
    state.wait_for()
    assert state.inner_text().endswith("(Request 7e57)")
    page.get_by_role("radio", name="Rollout").check()
    wait_for_map(page, "rollout")
    assert sum("method=attention" in call["address"] for call in page.evaluate("calls")) == 1
    visit.check(refusals={status})


def test_methods_that_a_network_has_not_are_not_offered(open_page, service, tiles):
    visit = open_page()
    page = visit.page
    card = httpx.get(service + "/model", timeout=PATIENCE_S).json()
    card |= {"layers": 0, "heads": 0, "maps": {**card["maps"], "methods": ["evidence", "occlusion"]}}
    page.context.route("**/model", lambda route: route.fulfill(json=card))
    page.reload()
    drop(page, ("tile.png", tiles[0]))
    wait_for_map(page)
    assert page.locator("#methods label:visible").all_inner_texts() == ["Evidence", "Occlusion"]
    visit.check()


@pytest.mark.parametrize(("status", "said"), [(503, "Not ready"), (404, "It doesn't say whether it is ready")])
def test_whether_the_service_is_ready_is_said(open_page, status, said):
    page = open_page().page
    page.locator("#health:has-text('Ready, on cpu (fp32)')").wait_for()
    page.context.route("**/readyz", lambda route: route.fulfill(status=status, body="none of the expected"))
    page.reload()
    page.locator(f'#health:has-text("{said}")').wait_for()


def test_tiff_is_drawn_where_browsers_cannot(open_page):
    colours = draw_tile("Mucosa", 1)
    greys = colours.mean(axis=2).astype(np.uint8)
    page = open_page().page
    cases: list[tuple[np.ndarray, dict[str, Any]]] = [
        *((colours, {"compression": name}) for name in ("raw", "tiff_lzw", "tiff_adobe_deflate", "packbits")),
        (colours, {"compression": "tiff_lzw", "tiffinfo": {317: 2}}),  # differences along the rows
        (greys, {"compression": "tiff_lzw"}),
        (greys.astype(np.uint16) * 257, {}),
    ]
    for pixels, options in cases:
        expected = np.asarray(Image.fromarray(greys if pixels.ndim == 2 else colours).convert("RGB"))
        assert np.array_equal(draw_tiff(page, encode(pixels, "TIFF", **options)), expected), options


def draw_tiff(page: Any, file: bytes) -> np.ndarray:
    width, height, drawn = page.evaluate(
        """(data) => import("./static/page/tiff.js").then(async ({readTiff}) => {
             const image = await readTiff(Uint8Array.from(atob(data), (letter) => letter.charCodeAt(0)));
             const letters = Array.from(image.data, (value) => String.fromCharCode(value));
             return [image.width, image.height, btoa(letters.join(""))];
           })""",
        base64.b64encode(file).decode(),
    )
    pixels = np.frombuffer(base64.b64decode(drawn), np.uint8).reshape(height, width, 4)
    assert (pixels[..., 3] == 255).all()
    return pixels[..., :3]


def test_a_tiff_is_drawn_upright(open_page):
    """As the service reads it, so that the box of its answer lies where it looked."""
    page = open_page().page
    for orientation in range(10):  # of which 0 and 9 mean nothing
        file = encode(draw_tile("Mucosa", 1)[:, :110], "TIFF", tiffinfo={274: orientation})
        expected = decode(file).rgb
        assert expected.shape[:2] == ((110, 150) if 5 <= orientation <= 8 else (150, 110))
        assert np.array_equal(draw_tiff(page, file), expected), orientation


@pytest.mark.parametrize(
    "entries",
    [
        {277: 1, 322: 2**31, 323: 2**31, 324: 8, 325: 8},  # one tile of 2 ** 62 pixels
        {277: 65535, 278: 32, 273: 8, 279: 8},  # pixels of so many samples
        {277: 1, 278: 0, 273: 8, 279: 8},  # strips without rows
    ],
)
def test_a_tiff_with_absurd_sizes_does_not_stall_the_page(open_page, entries):
    tags = {256: 32, 257: 32, 258: 8, 259: 1, 262: 1, 317: 2} | entries
    directory = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in sorted(tags.items()))
    tiff = b"II*\0" + struct.pack("<IH", 8, len(tags)) + directory + bytes(64)
    refusal = open_page().page.evaluate(
        """(data) => import("./static/page/tiff.js").then(({readTiff}) =>
             readTiff(Uint8Array.from(atob(data), (letter) => letter.charCodeAt(0)))
           ).then(() => "drawn", (error) => error.message)""",
        base64.b64encode(tiff).decode(),
    )
    assert refusal.startswith("this page can't draw such a TIFF")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_no_serious_fault(open_page, tiles, scheme):
    page = open_page(color_scheme=scheme, reduced_motion="reduce").page
    axe = Path(pytest.importorskip("axe_playwright_python").__file__).with_name("axe.min.js").read_text()
    page.evaluate(axe)

    def check() -> None:
        found = page.evaluate("axe.run().then((result) => result.violations)")
        serious = [
            (fault["id"], [node["html"][:150] for node in fault["nodes"]])
            for fault in found
            if fault["impact"] in ("serious", "critical")
        ]
        assert serious == []

    check()
    give(page, ("tile.png", tiles[0]), ("debris.png", tiles[4]), ("notes.png", b"no image"))
    wait_until_done(page, 3)
    wait_for_map(page)
    page.locator(".facts summary").click()
    page.get_by_role("radio", name="Attention").check()
    page.locator("#heads summary").click()
    page.locator("#heads-grid[aria-busy=false] table").wait_for()
    check()
    page.get_by_role("button", name="Table").click()
    page.get_by_role("button", name="notes.png").click()
    check()
    page.get_by_role("button", name="Model card").click()
    check()
