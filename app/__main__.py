"""`tissue` on the command line: `serve`, `predict tiles/`, `attention a.png -o b.png`, `doctor`.

Answers go to stdout, all else to stderr. What a command needs is imported by it, so that `tissue --help` is quick.
"""

import asyncio
import enum
import functools
import glob
import inspect
import os
import sys
import types
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractAsyncContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NoReturn, Union, get_args, get_origin

import typer
from pydantic import BaseModel, ValidationError
from rich.console import Console
from rich.progress import Progress

from app.export import Answer
from app.printing import Form, console, escape, name_picture, print_whole, start_rows
from app.schemas import AttentionOptions, PredictOptions
from app.settings import CLIENT_KEY, PREFIX, Settings

if TYPE_CHECKING:
    import httpx
    import numpy as np
    from numpy.typing import NDArray

    from app.client import Card

    Connection = AbstractAsyncContextManager[httpx.AsyncClient]

Command = Callable[..., None]

WRONG_USE = 2  # the status with which typer refuses a value itself

# Not markup here either: complaints name files, too.
complaints = Console(markup=False, highlight=False, stderr=True, soft_wrap=True)

cli = typer.Typer(
    help="Tells which tissue a small H&E image shows, how sure it is, and where it looked.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

Url = Annotated[
    str | None, typer.Option(help="Ask the service there, e.g. http://127.0.0.1:8000. Unset: no server is needed.")
]
ApiKey = Annotated[
    str | None,
    typer.Option(
        envvar=CLIENT_KEY, help="Key of that service, where it asks for one; in the variable no other user sees it."
    ),
]
Artifact = Annotated[
    Path | None,
    typer.Option(help="Directory of the artefact, without --url. Unset: TISSUE_ARTIFACT or the shipped one."),
]


def offer(model: type[BaseModel], leave_out: str | None = None) -> Callable[[Command], Command]:
    """Adds an option for each field of the model, so that the two can't part; the model judges the values."""

    def add_options(command: Command) -> Command:
        own = inspect.signature(command).parameters.values()
        offered = [
            inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=make_option(field))
            for name, field in model.model_fields.items()
            if name != leave_out
        ]
        kept = [parameter for parameter in own if parameter.kind is not inspect.Parameter.VAR_KEYWORD]
        command.__signature__ = inspect.Signature([*kept, *offered])  # type: ignore[attr-defined]
        return command

    return add_options


def make_option(field: Any) -> Any:
    if field.annotation is bool:
        return Annotated[bool | None, typer.Option(help=field.description)]
    default = str(field.default) if field.default not in (None, ()) else False
    values = name_values(field.annotation)
    return Annotated[str | None, typer.Option(help=field.description, metavar=values, show_default=default)]


def name_values(annotation: Any) -> str:
    if get_origin(annotation) is Literal:
        return "|".join(get_args(annotation))
    if get_origin(annotation) in (Union, types.UnionType):
        return "|".join(name_values(part) for part in get_args(annotation) if part is not types.NoneType)
    if get_origin(annotation) is Annotated:
        return name_values(get_args(annotation)[0])
    if isinstance(annotation, type) and issubclass(annotation, enum.Enum):
        return "|".join(str(member.value) for member in annotation)
    return str(annotation.__name__).lower() if annotation is not str else "text"


def print_version(asked: bool) -> None:
    if asked:
        from importlib.metadata import version

        typer.echo(f"tissue {version('tissue')}")
        raise typer.Exit


@cli.callback()
def tissue(
    version: Annotated[
        bool, typer.Option("--version", callback=print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None: ...


@cli.command()
@offer(Settings, leave_out="api_keys")  # a list of processes shows what stands on a command line
def serve(**settings: str | None) -> None:
    """Serve the HTTP API until SIGTERM or Ctrl-C.

    Each option beats the variable of its name: --max-queue is TISSUE_MAX_QUEUE.
    """
    chosen = read_settings(**settings)
    if os.environ.get(CLIENT_KEY) and not chosen.read_keys():  # meant for the plural? Then the door must not stay open
        fail(f"{CLIENT_KEY} is what `tissue predict` sends; to ask others for keys set TISSUE_API_KEYS, else unset it")
    with complaining():
        from app import server

        server.serve(chosen)


@cli.command()
@offer(PredictOptions)
def predict(
    files: Annotated[list[str], typer.Argument(help="Pictures, folders of them, or globs; - is the one on stdin.")],
    form: Annotated[
        Form, typer.Option("--format", help="Form of the answer. csv and jsonl come row by row, geojson is for QuPath.")
    ] = "table",
    url: Url = None,
    api_key: ApiKey = None,
    artifact: Artifact = None,
    features: Annotated[
        Path | None, typer.Option(help="Also write what the model's last layer read: .npy, a row for each picture.")
    ] = None,
    grid: Annotated[
        bool, typer.Option("--grid", help="Cut each picture, of known scale, into adjoining tiles and judge them all.")
    ] = False,
    **query: Any,
) -> None:
    """Say which tissue each picture shows. Exits with 1 where one could not be answered, with 2 on a wrong option."""
    pictures = find_pictures(files)
    check_choices(pictures, form, features, grid)
    if grid:
        query["mpp"] = read_scale(query["mpp"])
    with complaining(), showing_progress(form, None if grid else len(pictures)) as when_done:
        outcome = asyncio.run(
            ask_for_all(connect(url, api_key, artifact), pictures, query, form, features is not None, grid, when_done)
        )
    print_whole(outcome.unprinted, outcome.card, form)
    for name, reason in outcome.failed.items():
        complaints.print(f"{name}: {escape(reason)}")
    if features is not None:
        save_rows(features, outcome.rows)
    if outcome.failed:
        fail(f"{len(outcome.failed)} of {outcome.count} failed")


@cli.command()
@offer(AttentionOptions, leave_out="format")
def attention(
    file: Annotated[Path, typer.Argument(help="The picture; - is the one on stdin.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Where the map goes: .png, .npy or .json.")],
    url: Url = None,
    api_key: ApiKey = None,
    artifact: Artifact = None,
    **query: str | bool | None,
) -> None:
    """Draw where in the picture the model looked."""
    form = output.suffix.lower().removeprefix(".")
    if form not in ("png", "npy", "json"):
        fail(f"{output} must end in .png, .npy or .json, which also says what is written", WRONG_USE)
    if os.path.isdir(file):  # Path.is_dir raises where the name is too long
        fail(f"{file} is a folder; give one picture")
    with complaining():
        answer = asyncio.run(ask_attention(connect(url, api_key, artifact), file, query | {"format": form}))
    try:
        output.write_bytes(answer)
    except OSError as error:
        fail(f"{output} can't be written: {error.strerror}")


@cli.command()
def doctor(
    artifact: Annotated[
        Path | None,
        typer.Option(help="Directory of the artefact. Unset: TISSUE_ARTIFACT or the shipped one."),
    ] = None,
) -> None:
    """Look over this installation and say what to do about what is wrong. Exits with 1 where something is."""
    settings = read_settings(artifact=artifact)
    from app.doctor import examine

    wrong = 0
    for finding in examine(settings):
        wrong += bool(finding.advice)
        console.print(f"{'!!' if finding.advice else 'ok'}  {finding.subject:<12} {finding.text}", soft_wrap=True)
        if finding.advice:
            console.print(f"    {'':<12} -> {finding.advice}", style="yellow", soft_wrap=True)
    if wrong:
        fail(f"{wrong} of these must be mended")


def fail(sentence: str, status: int = 1) -> NoReturn:
    complaints.print(f"tissue: {sentence}", style="red")
    raise typer.Exit(status)


@contextmanager
def complaining() -> Iterator[None]:
    """What the user can mend is said in a sentence; a mistake of ours keeps its traceback."""
    from app.client import WRONG_OPTION, Unanswered
    from model.artifact import CorruptArtifact
    from model.session import DeviceUnavailable

    try:
        yield
    except Unanswered as error:
        code = error.problem.get("code")
        if code == "unauthorized":
            fail("the service asks for a key, and none came or a wrong one: give --api-key, or set TISSUE_API_KEY")
        fail(escape(str(error)), WRONG_USE if code in WRONG_OPTION else 1)
    except (CorruptArtifact, DeviceUnavailable) as error:
        fail(str(error))


def read_settings(**given: Any) -> Settings:
    options = {name: value for name, value in given.items() if value is not None}
    try:
        return Settings(**options)
    except ValidationError as error:
        is_misuse = any(name in options for problem in error.errors() for name in problem["loc"])
        sentence = "; ".join(explain_setting(dict(problem), options) for problem in error.errors())
        fail(sentence, WRONG_USE if is_misuse else 1)


def explain_setting(problem: dict[str, Any], options: dict[str, Any]) -> str:
    name = ".".join(map(str, problem["loc"]))
    sentence = str(problem["msg"]).removeprefix("Value error, ")
    if not name:
        return sentence
    given_as = f"--{name.replace('_', '-')}" if name in options else f"{PREFIX}{name.upper()}"
    is_secret = name.startswith("api_keys")  # which neither screens nor logs should show
    return f"{given_as}: {sentence}" if is_secret else f"{given_as}: {sentence}, got {problem['input']!r}"


def find_pictures(arguments: list[str]) -> list[Path]:
    """What matches nothing stays as it is, to be complained about in its turn."""
    from app.client import SUFFIXES

    pictures: list[Path] = []
    for argument in arguments:
        if not argument:  # as a path it would be the working directory, with all that is in it
            sentence = "one of the arguments is empty, perhaps a variable that isn't set; `.` is the folder you are in"
            fail(sentence, WRONG_USE)
        path = Path(argument)
        try:
            files = list_shown(path) if path.is_dir() else list_matches(argument)
            matches = sorted(file for file in files if file.suffix.lower() in SUFFIXES and file.is_file())
            pictures += matches if matches and not path.is_file() else [path]
        except OSError:  # such as a name that is too long for any file
            pictures.append(path)
    return pictures


def list_shown(folder: Path) -> Iterator[Path]:
    """Without what a dot hides, as in globs: on a stick a Mac writes `._a.png`, no picture, beside `a.png`."""
    for path in folder.rglob("*"):
        if not any(part.startswith(".") for part in path.relative_to(folder).parts):
            yield path


def list_matches(pattern: str) -> Iterable[Path]:
    """Each file once, by its shortest way: `**` follows links of folders, in circles too."""
    matches = sorted(map(Path, glob.glob(pattern, recursive=True)), key=lambda file: len(file.parts), reverse=True)
    find_folder = functools.cache(os.path.realpath)
    return {(find_folder(file.parent), file.name): file for file in matches}.values()


def check_choices(pictures: list[Path], form: Form, features: Path | None, grid: bool) -> None:
    from app.client import STDIN

    wrong = None
    if features is not None and features.suffix.lower() != ".npy":
        wrong = f"{features} must end in .npy, which is what is written"
    elif features is not None and grid:
        wrong = "--features keeps a row for each picture, not for each of its tiles; leave it or --grid away"
    elif features is not None and STDIN in pictures:
        wrong = "--features asks for each picture twice, and stdin can be read but once; save the picture to a file"
    elif form == "geojson" and not (grid and len(pictures) == 1):
        wrong = f"--format geojson lays the tiles of one picture over it: give one, with --grid; {len(pictures)} came"
    if wrong:
        fail(wrong, WRONG_USE)
    if features is not None:
        check_writable(features)


def check_writable(file: Path) -> None:
    """By opening it, as rights alone don't tell; to append, so that what it holds stays until it is replaced."""
    try:
        file.open("ab").close()
    except OSError as error:
        fail(f"{file} can't be written: {error.strerror}")


def read_scale(mpp: str | None) -> float | None:
    try:
        return None if mpp is None else float(mpp)
    except ValueError:
        fail(f"--mpp is {mpp!r}; it must be a number, the um per pixel, such as 0.495", WRONG_USE)


@contextmanager
def showing_progress(form: Form, total: int | None) -> Iterator[Callable[[], None]]:
    """A bar where somebody looks, unless printed rows show the progress already; stdout is left alone."""
    is_seen = complaints.is_terminal and not (form in ("csv", "jsonl") and sys.stdout.isatty())
    with Progress(console=complaints, disable=not is_seen, transient=True, redirect_stdout=False) as progress:
        task = progress.add_task("predicting", total=total)
        yield lambda: progress.advance(task)


def connect(url: str | None, api_key: str | None, artifact: Path | None) -> "Connection":
    from app import client

    if url is None:
        return client.open_here(read_settings(artifact=artifact))
    if artifact is not None:
        fail("--artifact is for predicting without a service; leave it or --url away", WRONG_USE)
    return client.connect(url, api_key)


@dataclass(frozen=True)
class Outcome:
    """All that is kept of the answers, which may be a hundred thousand."""

    card: "Card"
    unprinted: list[Answer]  # all of them in the forms that print at the end, else none
    failed: dict[str, str]  # why, by the name of the picture or tile
    count: int
    rows: "NDArray[np.float32]"  # of features, where they were asked for


async def ask_for_all(
    connection: "Connection",
    pictures: list[Path],
    query: dict[str, Any],
    form: Form,
    with_features: bool,
    grid: bool,
    when_done: Callable[[], None],
) -> Outcome:
    from app import client

    unprinted: list[Answer] = []
    failed: dict[str, str] = {}
    count = 0
    async with connection as service:
        card = await client.ask_model(service)
        take = start_rows(form, card, grid) or unprinted.append
        asked = client.ask_grid(service, pictures, query, card) if grid else client.ask_all(service, pictures, query)
        async for answer in asked:
            count += 1
            if "error" in answer:
                failed[name_picture(answer)] = answer["error"]["detail"]
            take(answer)
            when_done()
        described = pictures if with_features else []
        rows, missing = await client.ask_features(service, described, query["mpp"], card.feature_width)
    for file, why in missing.items():
        failed.setdefault(name_picture({"file": file}), f"no features: {why}")
    return Outcome(card, unprinted, failed, count, rows)


def save_rows(file: Path, rows: "NDArray[np.float32]") -> None:
    import numpy as np

    try:
        with file.open("wb") as opened:  # given the name, numpy would write `a.NPY.npy`
            np.save(opened, rows)
    except OSError as error:
        fail(f"{file} can't be written: {error.strerror or error}")


async def ask_attention(connection: "Connection", picture: Path, query: dict[str, Any]) -> bytes:
    from app import client

    async with connection as service:
        return (await client.ask(service, "/attention", picture, query)).content


if __name__ == "__main__":
    cli()
