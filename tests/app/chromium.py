"""A real Chromium, as a user without internet sees a page in it: the network and the console are watched."""

import os
import re
import shutil
from collections.abc import Collection, Iterator
from typing import Any
from urllib.parse import urlsplit

import pytest

from tests.app.conftest import PATIENCE_S

playwright = pytest.importorskip("playwright.sync_api", reason="no playwright: pip install '.[test]'")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)

NEEDS_CHROMIUM = [
    pytest.mark.browser,
    pytest.mark.skipif(CHROMIUM is None, reason="NO CHROMIUM: the pages go untested; apt-get install chromium"),
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
        self.page.on("requestfailed", self._note_failure)

    def open(self, path: str) -> Any:
        response = self.page.goto(self._url + path, wait_until="networkidle")
        assert response.status == 200
        return self.page

    def check(self, refusals: Collection[int] = ()) -> None:
        """Nothing was asked of strangers and nothing went wrong, but for answers of these statuses, which Chromium
        writes into the console whatever the page makes of them."""
        refused = re.compile(r"Failed to load resource: the server responded with a status of (\d+)")
        statuses = [refused.match(complaint) for complaint in self.complaints]
        unforeseen = [
            complaint
            for complaint, status in zip(self.complaints, statuses, strict=True)
            if not (status and int(status[1]) in refusals)
        ]
        assert self.strangers == []
        assert unforeseen == []
        assert self.page.evaluate("violations") == []

    def _let_through(self, route: Any) -> None:
        address = urlsplit(route.request.url)
        if address.netloc == self._home or address.scheme in ("data", "blob"):
            route.continue_()
        else:
            self.strangers.append(route.request.url)
            route.abort()

    def _note_failure(self, request: Any) -> None:
        if request.failure != "net::ERR_ABORTED":  # as the page does with what it no longer needs
            self.complaints.append(f"failed: {request.url}")

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
