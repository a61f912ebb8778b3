"""What a browser loads: every file is here, nothing is asked of anybody else."""

import re
import runpy
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from app import main
from training.synthetic import draw_tile

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


def test_the_page_itself_needs_no_inline_style_and_turns_no_text_into_html(client):
    policy = client.get("/").headers["content-security-policy"]
    assert "unsafe" not in policy and "require-trusted-types-for 'script'; trusted-types 'none'" in policy


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


def test_the_sample_tiles_are_drawn_ones():
    """No tissue of anybody: the command that makes them draws the same."""
    make = runpy.run_path(str(Path(__file__).parents[2] / "docs" / "images" / "make.py"))
    files = sorted((WEB / "samples").iterdir())
    assert [file.stem for file in files] == sorted(kind.lower() for kind in make["SEEDS"])
    for kind, seed in make["SEEDS"].items():
        with Image.open(WEB / "samples" / f"{kind.lower()}.png") as sample:
            assert np.array_equal(np.asarray(sample), draw_tile(kind, seed))
            assert 25400 / sample.info["dpi"][0] == pytest.approx(make["UM_PER_PX"], rel=1e-3)


def test_only_the_web_folder_is_served(client):
    for path in ("/static/../main.py", "/static/%2e%2e/main.py", "/static/vendor"):
        assert client.get(path).status_code == 404
