"""Answers on stdout, in the form that was asked for: row by row as they come, or all at the end."""

import csv
import io
import json
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Literal

import typer
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Column, Table

from app.export import Answer, flatten, list_columns

if TYPE_CHECKING:
    from app.client import Card

Form = Literal["table", "json", "jsonl", "csv", "geojson"]

# File and class names may hold brackets, which are not markup. In a pipe a table's lines must stay whole.
console = Console(markup=False, highlight=False, width=None if sys.stdout.isatty() else 250)


def start_rows(form: Form, card: "Card", grid: bool) -> Callable[[Answer], None] | None:
    """What prints an answer as soon as it is there; None in the forms that print all at the end."""
    match form:
        case "jsonl":
            return lambda answer: typer.echo(json.dumps(answer))
        case "csv":
            return start_csv([known.name for known in card.classes], grid)
        case _:
            return None


def start_csv(classes: list[str], grid: bool) -> Callable[[Answer], None]:
    from app.grid import Place

    if isinstance(sys.stdout, io.TextIOWrapper):  # a name that isn't UTF-8 would end all; escaped it looks as in JSON
        sys.stdout.reconfigure(errors="backslashreplace")
    columns = list_columns(classes, Place._fields if grid else ())
    # A service whose model has changed meanwhile may answer more than there are columns for. Where `;` separates, a
    # text without quotes would be cut at its own, and the rest could be a formula.
    writer = csv.DictWriter(
        sys.stdout, columns, extrasaction="ignore", quoting=csv.QUOTE_NONNUMERIC, lineterminator="\n"
    )
    writer.writeheader()

    def print_row(answer: Answer) -> None:
        cells = flatten(answer)
        shown = {column: escape(cell) if isinstance(cell, str) else cell for column, cell in cells.items()}
        writer.writerow(shown | {"file": cells["file"]})  # by its very name it is found again
        sys.stdout.flush()

    return print_row


def print_whole(answers: list[Answer], card: "Card", form: Form) -> None:
    match form:
        case "json":
            typer.echo(json.dumps(answers, indent=2))
        # Without any tile nothing is printed, or the empty file would pass for a result.
        case "geojson" if any("error" not in answer for answer in answers):
            from app.grid import to_geojson

            typer.echo(json.dumps(to_geojson(answers, {known.name: known.color for known in card.classes})))
        case "table":
            print_table([answer for answer in answers if "error" not in answer])


def escape(text: str) -> str:
    """Without the characters that a terminal would obey."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def name_picture(answer: Answer) -> str:
    file = escape(str(answer["file"]))
    box = answer.get("box")
    return f"{file} at {box['x']}, {box['y']}" if box else file


def print_table(answers: list[Answer]) -> None:
    table = Table(
        Column("file", overflow="fold"), "label", Column("confidence", justify="right"), "verdict", box=SIMPLE
    )
    for answer in answers:
        remarks = ", ".join(escape(remark["code"]) for remark in (*answer["reasons"], *answer["warnings"]))
        verdict = f"{answer['verdict']} ({remarks})" if remarks else answer["verdict"]
        table.add_row(name_picture(answer), escape(answer["label"]), f"{answer['confidence']:.3f}", verdict)
    if answers:
        console.print(table)
