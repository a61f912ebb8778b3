"""Makes the page's sample tiles and the pictures of the page, with the service and the Chromium that are here.

    python docs/images/make.py samples            app/web/samples/
    python docs/images/make.py page [--all FOLDER]   docs/images/page.png; with --all, every state into a folder

Every tile is a drawn one (training/synthetic.py); none is tissue.
"""

import io
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Thread
from typing import Annotated, Any

import typer
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from training.synthetic import draw_tile

ROOT = Path(__file__).parents[2]
SAMPLES = ROOT / "app" / "web" / "samples"
# One field a kind, chosen so that the page has something of everything to show: sure, unsure, wrong and refused.
SEEDS = {"Tumor": 9, "Stroma": 6, "Complex": 4, "Lympho": 2, "Debris": 0, "Mucosa": 6, "Empty": 0}
UM_PER_PX = 0.495
PATIENCE_MS = 120_000

cli = typer.Typer(no_args_is_help=True)


@cli.command()
def samples() -> None:
    """The tiles that the page offers to start with, tagged with their scale."""
    SAMPLES.mkdir(exist_ok=True)
    for kind, seed in SEEDS.items():
        dpi = 25400 / UM_PER_PX
        note = PngInfo()
        note.add_text("Comment", "Drawn by a program; no tissue")
        Image.fromarray(draw_tile(kind, seed)).save(
            SAMPLES / f"{kind.lower()}.png", dpi=(dpi, dpi), pnginfo=note, optimize=True
        )


@cli.command()
def page(
    all: Annotated[Path | None, typer.Option(help="Folder for every state, not only the one shown")] = None,
) -> None:
    """The page with answers in it."""
    with open_browser() as browser, serve() as url:
        shoot_answers(browser, url, ROOT / "docs" / "images" / "page.png")
        if all:
            all.mkdir(parents=True, exist_ok=True)
            shoot_states(browser, url, all)
            shoot_problems(browser, all)


def shoot_answers(browser: Any, url: str, to: Path, **options: Any) -> None:
    with visit(browser, url, **options) as tab:
        take_samples(tab)
        with tab.expect_response("**/attention*"):
            tab.locator("#gallery [role=option]").nth(3).click()
        wait_for_map(tab)
        tab.screenshot(path=to)


def shoot_states(browser: Any, url: str, folder: Path) -> None:
    for scheme in ("light", "dark"):
        with visit(browser, url, color_scheme=scheme) as tab:
            tab.screenshot(path=folder / f"empty-{scheme}.png")
            take_samples(tab)
            wait_for_map(tab)
            tab.screenshot(path=folder / f"samples-{scheme}.png", full_page=True)
            tab.get_by_role("radio", name="Attention").check()
            wait_for_map(tab)
            tab.locator("#map").focus()
            for _ in range(4):
                tab.keyboard.press("ArrowDown")
            tab.get_by_role("button", name="Overlay").click()
            tab.locator(".facts summary").click()
            tab.screenshot(path=folder / f"attention-{scheme}.png", full_page=True)
            tab.get_by_role("button", name="Model card").click()
            tab.screenshot(path=folder / f"card-{scheme}.png")
            tab.keyboard.press("Escape")
            drop_many(tab)
            show_failure(tab)
            tab.screenshot(path=folder / f"failed-{scheme}.png")
            tab.keyboard.press("Home")
            wait_for_map(tab)
            tab.screenshot(path=folder / f"many-{scheme}.png")
            tab.get_by_role("button", name="Table").click()
            tab.screenshot(path=folder / f"table-{scheme}.png")
    with visit(browser, url, viewport={"width": 360, "height": 740}) as tab:
        tab.screenshot(path=folder / "phone-empty.png", full_page=True)
        take_samples(tab)
        wait_for_map(tab)
        tab.screenshot(path=folder / "phone.png", full_page=True)


def shoot_problems(browser: Any, folder: Path) -> None:
    with serve(TISSUE_API_KEYS="open-sesame") as url, visit(browser, url) as tab:
        tab.locator("#key[open]").wait_for()
        tab.screenshot(path=folder / "key.png")
    with serve(TISSUE_MAX_QUEUE="1", TISSUE_INFER_THREADS="1") as url, visit(browser, url) as tab:
        drop_many(tab)
        tab.locator("#progress-note:not(:empty)").wait_for()
        tab.screenshot(path=folder / "busy.png")


def take_samples(tab: Any) -> None:
    tab.get_by_role("button", name="All of them").click()
    tab.locator("#progress[data-done=true]").wait_for()


def drop_many(tab: Any) -> None:
    files = [
        {"name": f"slide7_{kind.lower()}_{seed:02}.png", "mimeType": "image/png", "buffer": draw_png(kind, seed)}
        for seed in range(16)
        for kind in ("Tumor", "Complex", "Lympho", "Debris")
    ]
    files.append({"name": "notes.png", "mimeType": "image/png", "buffer": b"no image"})
    tab.locator("#files").set_input_files(files)


def draw_png(kind: str, seed: int) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(draw_tile(kind, seed)).save(buffer, "PNG")
    return buffer.getvalue()


def show_failure(tab: Any) -> None:
    tab.locator("#progress[data-done=true]").wait_for()
    tab.locator("#gallery [data-state=failed]").click()
    tab.locator("#tile[data-state=failed]").wait_for()


def wait_for_map(tab: Any) -> None:
    tab.locator("#viewer[aria-busy=false] #scale:not(.empty)").wait_for()


@contextmanager
def visit(browser: Any, url: str, **options: Any) -> Iterator[Any]:
    context = browser.new_context(**{"viewport": {"width": 1300, "height": 1000}} | options)
    tab = context.new_page()
    tab.set_default_timeout(PATIENCE_MS)
    tab.goto(url, wait_until="networkidle")
    try:
        yield tab
    finally:
        context.close()


@contextmanager
def open_browser() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    program = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if program is None:
        raise SystemExit("there is no Chromium here: apt-get install chromium")
    is_root = hasattr(os, "geteuid") and os.geteuid() == 0
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=program, chromium_sandbox=not is_root)
        try:
            yield browser
        finally:
            browser.close()


@contextmanager
def serve(**variables: str) -> Iterator[str]:
    """`tissue serve` on a free port, until the pictures are taken."""
    command = [sys.executable, "-m", "app", "serve"]
    environ = os.environ | {"TISSUE_PORT": "0", "TISSUE_LOG_FORMAT": "json", "TISSUE_DRAIN_MS": "0"} | variables
    with subprocess.Popen(command, cwd=ROOT, env=environ, stderr=subprocess.PIPE) as process:
        assert process.stderr is not None
        address = ""
        for line in process.stderr:
            event = json.loads(line) if line.startswith(b"{") else {}
            address = event.get("address", address)
            if event.get("event") == "ready":
                break
        Thread(target=process.stderr.read, daemon=True).start()  # a log that nobody takes stops the service
        try:
            yield address
        finally:
            process.terminate()


if __name__ == "__main__":
    cli()
