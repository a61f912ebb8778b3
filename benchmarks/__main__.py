"""`python -m benchmarks` measures this service and its peers; `make bench` also writes docs/benchmarks.md."""

import dataclasses
import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from benchmarks import report
from benchmarks.comparison import Comparison, carry_out, read_samples
from benchmarks.load import WrkFailed
from benchmarks.servers import ROOT, SERVERS, install, pick_servers
from benchmarks.soak import soak
from benchmarks.tiles import load_tiles
from model.runtime import ort

RESULTS = ROOT / "benchmarks" / "results" / "cpu.jsonl"
SOAK_RESULTS = ROOT / "benchmarks" / "results" / "soak.json"
PAGE = ROOT / "docs" / "benchmarks.md"
NOT_ALL_DONE = 3

cli = typer.Typer(help="Measure this service and what else one could pick.", no_args_is_help=True, add_completion=False)
out, err = Console(), Console(stderr=True)

Results = Annotated[Path, typer.Option(help="JSON lines; a run that was stopped goes on from them.")]


@contextmanager
def plain_errors() -> Iterator[None]:
    try:
        yield
    except (ValueError, RuntimeError, OSError) as error:
        err.print(f"[red]{type(error).__name__}[/]: {error}", highlight=False, soft_wrap=True)
        raise typer.Exit(1) from error


@cli.command("install")
def install_peers(skip: Annotated[list[str] | None, typer.Option(help="A server to leave out.")] = None) -> None:
    """An environment for each peer under runs/bench/venv/, with ONNX Runtime in the version that is here."""
    with plain_errors():
        venvs = {server.venv for server in pick_servers(set(skip or [])) if server.venv}
        for venv in sorted(venvs):
            out.print(f"installing {venv}")
            install(venv, version_of_onnxruntime())


@cli.command()
def run(
    seconds: Annotated[float, typer.Option(help="Length of each closed loop; all other lengths follow it.")] = 5,
    rounds: Annotated[int, typer.Option(min=1)] = 3,
    skip: Annotated[list[str] | None, typer.Option(help=f"One of {', '.join(s.name for s in SERVERS)}.")] = None,
    tiles: Annotated[Path | None, typer.Option(help="A folder of pictures to send instead of drawn ones.")] = None,
    minutes: Annotated[float, typer.Option(help="Start nothing after this; the same command goes on.")] = float("inf"),
    results: Results = RESULTS,
) -> None:
    """All servers in turn, with all loads. Status 3: stopped by --minutes before all was measured."""
    with plain_errors():
        skipped = sorted(skip or [])
        servers = pick_servers(set(skipped))
        if missing := sorted({server.venv for server in servers if server.venv and not server.is_installed}):
            raise WrkFailed(f"{', '.join(missing)} not installed; `python -m benchmarks install` does it")
        comparison = Comparison(servers, skipped, seconds, rounds, tiles, results)
        if not carry_out(comparison, 60 * minutes, lambda step: out.print(step, highlight=False)):
            raise typer.Exit(NOT_ALL_DONE)


@cli.command("soak")
def run_soak(requests: int = 100_000, results: Path = SOAK_RESULTS) -> None:
    """Many requests at this service: does its memory grow?"""
    with plain_errors():
        found = soak(SERVERS[0], load_tiles("jpeg"), ROOT / "runs" / "bench" / "log" / "soak.log", requests)
        results.parent.mkdir(parents=True, exist_ok=True)
        results.write_text(json.dumps(dataclasses.asdict(found)) + "\n")
        out.print(f"{found.second_half_growth_mib:+.1f} MiB over the last half, peak {found.peak_rss_mib:.0f} MiB")


@cli.command("report")
def write_report(results: Results = RESULTS, page: Path = PAGE) -> None:
    """Tables and pictures from the results, into docs/."""
    with plain_errors():
        found = json.loads(SOAK_RESULTS.read_text()) if SOAK_RESULTS.exists() else None
        report.write(read_samples(results), found, page)


def version_of_onnxruntime() -> str:
    return str(ort.__version__)


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    cli()
