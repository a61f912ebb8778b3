"""The docs pages in a real Chromium, as a user without internet sees them: it watches the network and the console."""

from collections.abc import Iterator
from typing import Any

import pytest

from tests.app.chromium import NEEDS_CHROMIUM, Visit
from tests.app.chromium import browser as browser

pytestmark = NEEDS_CHROMIUM


@pytest.fixture
def visit(browser, server) -> Iterator[Visit]:
    context = browser.new_context(viewport={"width": 1300, "height": 1000})
    yield Visit(context, server.url)
    context.close()


def open_operation(page: Any, path: str) -> Any:
    """The route's panel in Swagger UI, unfolded and ready to be filled in."""
    panel = page.locator(".opblock", has=page.locator(f'.opblock-summary-path[data-path="{path}"]'))
    panel.locator(".opblock-summary-control").click()
    panel.locator(".try-out__btn").click()
    return panel


def choose_file(panel: Any, name: str, image: bytes) -> None:
    panel.locator("input[type=file]").first.set_input_files({"name": name, "mimeType": "image/png", "buffer": image})


def execute(panel: Any) -> Any:
    panel.locator("button.execute").click()
    answer = panel.locator(".live-responses-table")
    answer.wait_for()
    return answer


def read_status(answer: Any) -> str:
    return str(answer.locator("tbody .response-col_status").inner_text()).split()[0]


@pytest.mark.parametrize(
    ("path", "shows"), [("/", "Tissue"), ("/docs", "POST"), ("/redoc", "Tell which tissue an image shows")]
)
def test_a_page_asks_nothing_of_others_and_has_nothing_to_complain_about(visit, path, shows):
    page = visit.open(path)
    page.get_by_text(shows).locator("visible=true").first.wait_for()
    visit.check()


def test_the_watcher_sees_what_it_watches_for(visit):
    page = visit.open("/docs")
    page.evaluate("fetch('https://example.org/').catch(() => 0)")  # stopped by the page's policy
    assert page.evaluate("violations") == ["connect-src https://example.org/"] and visit.complaints
    with page.expect_event("requestfailed"):
        page.evaluate("location.href = 'http://example.org/'")  # which no policy stops
    assert visit.strangers == ["http://example.org/"]


@pytest.mark.parametrize("body", ["multipart/form-data", "image/png"])
def test_an_image_can_be_tried_out(visit, png, body):
    panel = open_operation(visit.open("/docs"), "/predict")
    panel.locator("select.content-type").first.select_option(body)
    choose_file(panel, "tile.png", png)
    answer = execute(panel)
    assert read_status(answer) == "200"
    assert '"label"' in answer.locator("tbody .response-col_description").inner_text()
    visit.check()


def test_many_images_can_be_tried_out(visit, png):
    panel = open_operation(visit.open("/docs"), "/predict/batch")
    panel.get_by_text("Add string item").click()
    choose_file(panel, "tile.png", png)
    answer = execute(panel)
    assert read_status(answer) == "200"
    assert '"tile.png"' in answer.locator("tbody .response-col_description").inner_text()
    visit.check()


def test_a_map_appears_in_the_page(visit, png):
    panel = open_operation(visit.open("/docs"), "/attention")
    panel.locator('tr[data-param-name="format"] select').select_option("png")
    choose_file(panel, "tile.png", png)
    answer = execute(panel)
    assert read_status(answer) == "200"
    picture = answer.locator("img")
    picture.wait_for()
    assert picture.evaluate("image => image.decode().then(() => image.naturalWidth)") > 300
    visit.check()


def test_a_path_may_stand_in_front_that_a_proxy_strips(visit, server):
    asked = []

    def strip(route: Any) -> None:
        asked.append(route.request.url)
        route.fulfill(response=route.fetch(url=route.request.url.replace("/tissue/", "/")))

    page = visit.open("/healthz")
    page.route(f"{server.url}/tissue/**", strip)
    page.goto(f"{server.url}/tissue/docs")
    answer = execute(open_operation(page, "/model"))
    assert read_status(answer) == "200"
    assert asked[-1] == f"{server.url}/tissue/model"
    visit.check()
