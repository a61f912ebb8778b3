"""The docs pages in a real Chromium, as a user without internet sees them: it watches the network and the console."""

import os
import shutil
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlsplit

import pytest

from tests.app.conftest import PATIENCE_S

playwright = pytest.importorskip("playwright.sync_api", reason="no playwright: pip install '.[test]'")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(CHROMIUM is None, reason="NO CHROMIUM: the docs pages go untested; apt-get install chromium"),
]

# Names lead nowhere, so what slips past the watcher fails as well.
FLAGS = [
    "--disable-quic",
    "--disable-background-networking",
    "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
]
WATCH_POLICY = """
window.violations = [];
document.addEventListener("securitypolicyviolation", (e) => violations.push(`${e.violatedDirective} ${e.blockedURI}`));
"""


class Visit:
    """A page, and all that it asked of others or complained about."""

    def __init__(self, context: Any, url: str) -> None:
        self.strangers: list[str] = []
        self.complaints: list[str] = []
        self._home = urlsplit(url).netloc
        self._url = url
        context.route("**/*", self._let_through)
        context.add_init_script(WATCH_POLICY)
        self.page = context.new_page()
        self.page.set_default_timeout(PATIENCE_S * 1000)
        self.page.on("console", self._note)
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("requestfailed", lambda request: self.complaints.append(f"failed: {request.url}"))

    def open(self, path: str) -> Any:
        response = self.page.goto(self._url + path, wait_until="networkidle")
        assert response.status == 200
        return self.page

    def check(self) -> None:
        assert self.strangers == []
        assert self.complaints == []
        assert self.page.evaluate("violations") == []

    def _let_through(self, route: Any) -> None:
        address = urlsplit(route.request.url)
        if address.netloc == self._home or address.scheme in ("data", "blob"):
            route.continue_()
        else:
            self.strangers.append(route.request.url)
            route.abort()

    def _note(self, message: Any) -> None:
        if message.type == "error":
            self.complaints.append(message.text)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    is_root = hasattr(os, "geteuid") and os.geteuid() == 0
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=FLAGS, chromium_sandbox=not is_root)
        yield browser
        browser.close()


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
