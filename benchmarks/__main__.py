"""`python -m benchmarks` measures this service and its peers, and writes it down; `make bench` does both."""

import dataclasses
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape

from benchmarks import report
from benchmarks.comparison import Comparison, carry_out, drop_disturbed, read_samples
from benchmarks.servers import BENCH, LOGS, SERVERS, TISSUE, VENVS, install, pick_servers
from benchmarks.soak import Soak, soak
from benchmarks.tiles import load_tiles
from model.runtime import ort

RESULTS = "cpu.jsonl"
SOAK_RESULTS = "soak.json"
REPORT = "report.md"
NOT_ALL_DONE = 3

cli = typer.Typer(help="Measure this service and what else one could pick.", no_args_is_help=True, add_completion=False)
out, err = Console(), Console(stderr=True)

Folder = Annotated[Path, typer.Option(help="Where the results are; a run that was stopped goes on from them.")]


@contextmanager
def plain_errors() -> Iterator[None]:
    try:
        yield
    except (ValueError, RuntimeError, OSError) as error:
        err.print(f"[red]{type(error).__name__}[/]: {escape(str(error))}", highlight=False, soft_wrap=True)
        raise typer.Exit(1) from error


@cli.command()
def run(
    seconds: Annotated[float, typer.Option(help="Length of each closed loop; all other lengths follow it.")] = 5,
    rounds: Annotated[int, typer.Option(min=1)] = 3,
    skip: Annotated[list[str] | None, typer.Option(help=f"One of {', '.join(s.name for s in SERVERS)}.")] = None,
    tiles: Annotated[Path | None, typer.Option(help="A folder of pictures to send instead of drawn ones.")] = None,
    minutes: Annotated[float, typer.Option(help="Start nothing after this; the same command goes on.")] = float("inf"),
    redo: Annotated[
        float, typer.Option(help="Repeat earlier steps during which other programs took more cores than this.")
    ] = float("inf"),
    folder: Folder = BENCH,
) -> None:
    """All servers in turn, with all loads. Status 3: stopped by --minutes before all was measured."""
    with plain_errors():
        skipped = sorted(skip or [])
        comparison = Comparison(pick_servers(set(skipped)), skipped, seconds, rounds, tiles, folder / RESULTS)
        comparison.check_conditions()
        for venv in sorted({server.venv for server in comparison.servers if server.venv and not server.is_installed}):
            out.print(f"installing {venv} under {VENVS}", soft_wrap=True)
            install(venv, ort.__version__)
        for step in drop_disturbed(comparison.results, redo):
            out.print(f"was disturbed, again: {step}", highlight=False)
        all_done = carry_out(comparison, 60 * minutes, lambda step: out.print(step, highlight=False))
    if not all_done:
        raise typer.Exit(NOT_ALL_DONE)


@cli.command("soak")
def run_soak(requests: int = 100_000, folder: Folder = BENCH) -> None:
    """Many requests at this service: does its memory grow?"""
    with plain_errors():
        soaked = soak(TISSUE, load_tiles("jpeg"), LOGS / "soak.log", requests)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / SOAK_RESULTS).write_text(json.dumps(dataclasses.asdict(soaked)) + "\n")
        out.print(f"{soaked.second_half_growth_mib:+.1f} MiB over the last half, peak {soaked.peak_rss_mib:.0f} MiB")


@cli.command("report")
def write_report(
    folder: Folder = BENCH,
    page: Annotated[
        Path | None, typer.Option(help=f"Unset: {REPORT} in the folder. What people wrote around its figures stays.")
    ] = None,
) -> None:
    """Tables and pictures from the results."""
    with plain_errors():
        soak_results = folder / SOAK_RESULTS
        soaked = Soak(**json.loads(soak_results.read_text())) if soak_results.exists() else None
        page = page or folder / REPORT
        report.write(read_samples(folder / RESULTS), soaked, page)
        out.print(str(page), markup=False, soft_wrap=True)


if __name__ == "__main__":
    cli()
