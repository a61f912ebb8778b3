"""What a browser loads: every file is here, nothing is asked of anybody else."""

import re
from pathlib import Path

import pytest

from app import main

WEB = Path(main.__file__).parent / "web"
PAGES = {"/": "index.html", "/docs": "docs.html", "/redoc": "redoc.html"}
# Addresses that the unchanged bundles of Swagger UI and ReDoc fetch from.
PHONING = ("validator.swagger.io", "cdn.redoc.ly", "jsdelivr", "unpkg.com", "fonts.googleapis", "googletagmanager")


@pytest.mark.parametrize("path", PAGES)
def test_pages_load_only_files_of_this_service(client, path):
    response = client.get(path)
    assert response.headers["content-type"].startswith("text/html")
    for address in re.findall(r'(?:src|href)="([^"]+)"', response.text):
        assert "//" not in address and not address.startswith("/"), address  # so that a proxy may put it under a path
        assert client.get(f"/{address}").status_code == 200, address


@pytest.mark.parametrize("path", PAGES)
def test_pages_forbid_inline_scripts_and_outside_addresses(client, path):
    response = client.get(path)
    policy = dict(part.strip().split(" ", 1) for part in response.headers["content-security-policy"].split(";"))
    assert policy["default-src"] == "'none'" and policy["script-src"] == "'self'" and policy["connect-src"] == "'self'"
    assert "http" not in response.headers["content-security-policy"]
    assert not re.search(r"<script(?![^>]*\bsrc=)|\bon\w+=|javascript:|<style|\bstyle=", response.text)


def test_the_page_itself_needs_no_inline_style(client):
    assert "unsafe" not in client.get("/").headers["content-security-policy"]


@pytest.mark.parametrize(
    "file", [path for path in WEB.rglob("*") if path.suffix in (".js", ".css", ".html")], ids=lambda path: path.name
)
def test_no_file_knows_an_outside_address_to_fetch_from(file):
    text = file.read_text()
    assert not [host for host in PHONING if host in text]
    assert not re.search(r"url\(\s*[\"']?(https?:)?//|@import", text)
    assert not re.search(r"sourceMappingURL=[^d]", text)


def test_the_vendored_files_are_few_and_carry_their_licences():
    vendor = WEB / "vendor"
    assert sum(path.stat().st_size for path in vendor.rglob("*")) < 3_300_000
    assert not list(vendor.rglob("*.map"))
    for folder in ("swagger-ui", "redoc"):
        assert (vendor / folder / "LICENSE").is_file() and list((vendor / folder).glob("*.LICENSE.txt"))


def test_only_the_web_folder_is_served(client):
    for path in ("/static/../main.py", "/static/%2e%2e/main.py", "/static/vendor"):
        assert client.get(path).status_code == 404
