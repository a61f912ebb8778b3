import asyncio
import csv
import hashlib
import io
import json
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import httpx
import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner, Result

from app import schemas
from app.__main__ import ask_for_all, cli, find_pictures
from app.client import open_here
from app.export import list_columns
from app.settings import Settings
from model.artifact import read_manifest
from tests.app.documents import PREDICTION, write_problem
from training.synthetic import draw_tile

KEY = "only-for-this-test"


@pytest.fixture(autouse=True)
def artifact(tiny_artifact: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in [name for name in os.environ if name.startswith("TISSUE_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("TISSUE_ARTIFACT", str(tiny_artifact))
    return tiny_artifact


@pytest.fixture
def tiles(tmp_path: Path) -> Path:
    """A folder with two pictures, one deeper, and what is no picture."""
    folder = tmp_path / "tiles"
    (folder / "deeper").mkdir(parents=True)
    rng = np.random.default_rng(0)
    for name in ("b.png", "deeper/a.TIF"):
        Image.fromarray(rng.integers(0, 256, (150, 150, 3), np.uint8)).save(folder / name)
    (folder / "notes.txt").write_text("no picture")
    (folder / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n but no more")
    return folder


@pytest.fixture(scope="module")
def service(tiny_artifact: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a real service in a process of its own, which asks for a key."""
    keys = tmp_path_factory.mktemp("keys") / "keys"
    keys.write_text(KEY)
    command = [sys.executable, "-m", "app", "serve", "--port", "0", "--drain-ms", "0", "--api-keys-file", str(keys)]
    # The variable is wrong on purpose: the option must beat it.
    environment = os.environ | {"TISSUE_ARTIFACT": str(tiny_artifact), "TISSUE_PORT": "1"}
    with subprocess.Popen(command, stderr=subprocess.PIPE, env=environment, text=True) as process:
        assert process.stderr is not None
        address = None
        for line in process.stderr:
            address = address or re.search(r"http://127\.0\.0\.1:\d+", line)
            if " ready" in line:
                break
        assert address, "the service did not start"
        yield address[0]
        process.send_signal(signal.SIGTERM)
        process.stderr.read()
    assert process.returncode == 0


def run(*arguments: object, stdin: bytes = b"") -> Result:
    return CliRunner().invoke(cli, [str(argument) for argument in arguments], input=stdin)


def is_one_sentence(result: Result, status: int = 1) -> bool:
    return result.exit_code == status and result.stderr.startswith("tissue: ") and result.stderr.count("\n") == 1


def test_version():
    assert re.fullmatch(r"tissue \d+\.\d+\.\d+\n", run("--version").stdout)


def test_import_is_light():
    heavy = "{'torch', 'onnxruntime', 'numpy', 'PIL', 'fastapi', 'httpx', 'uvicorn'}"
    program = f"import app.__main__, sys; print(sorted({heavy} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", program], capture_output=True, text=True).stdout == "[]\n"


def test_serve_has_an_option_for_every_setting_but_the_keys(monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    offered = set(re.findall(r"--([a-z-]+)", run("serve", "--help").stdout))
    expected = {name.replace("_", "-") for name in Settings.model_fields} - {"api-keys"}
    assert expected <= offered
    assert "api-keys" not in offered


def test_help_tells_what_is_taken_where_nothing_is_given(monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    assert re.search(r"--port .*default: \(8000\)", run("serve", "--help").stdout)
    assert re.search(r"--alpha .*default: \(0.5\)", run("attention", "--help").stdout)
    assert "--url" not in run("doctor", "--help").stdout


def test_predict_json_has_an_item_per_file_in_the_order_of_the_arguments(tiles):
    missing = tiles / "missing.png"
    result = run("predict", tiles / "deeper/a.TIF", missing, tiles / "notes.txt", tiles / "b.png", "--format", "json")
    assert result.exit_code == 1
    first, lost, text, last = json.loads(result.stdout)
    assert [item["file"] for item in (first, lost, text, last)] == [
        str(tiles / name) for name in ("deeper/a.TIF", "missing.png", "notes.txt", "b.png")
    ]
    assert schemas.AnsweredItem.model_validate(first).input.format == "TIFF"
    assert schemas.AnsweredItem.model_validate(last).input.format == "PNG"
    assert lost["error"]["code"] == "unreadable_file"
    assert schemas.FailedItem.model_validate(text).error.status == 415
    assert f"{missing}: " in result.stderr
    assert f"{tiles / 'notes.txt'}: " in result.stderr
    assert result.stderr.endswith("tissue: 2 of 4 failed\n")


def test_predict_ends_well_when_all_are_answered(tiles):
    result = run("predict", tiles / "b.png", tiles / "deeper", "--format", "json")
    assert (result.exit_code, result.stderr) == (0, "")
    assert len(json.loads(result.stdout)) == 2


def test_the_table_tells_what_is_remarked_on_an_image(tiles):
    assert "unknown_scale" in run("predict", tiles / "b.png").stdout
    assert "unknown_scale" not in run("predict", tiles / "b.png", "--mpp", "0.495").stdout


def test_predict_is_the_same_with_and_without_a_service(tiles, service):
    arguments = ["predict", tiles, "--format", "json", "--mpp", "0.495", "--tta"]
    here, there = run(*arguments), run(*arguments, "--url", service, "--api-key", KEY)
    assert here.exit_code == there.exit_code == 1, "broken.png is among them"
    items, served = json.loads(here.stdout), json.loads(there.stdout)
    for item in items + served:
        item.get("error", {}).pop("request_id", None)
    assert items == served
    assert [item["tta"]["views"] for item in items if "error" not in item] == [8, 8]
    assert [item["input"]["mpp_source"] for item in items if "error" not in item] == ["request", "request"]


def test_predict_csv_has_a_column_per_class(tiles, artifact):
    result = run("predict", tiles / "b.png", tiles / "broken.png", "--format", "csv")
    classes = read_manifest(artifact).class_names
    good, bad = csv.DictReader(io.StringIO(result.stdout))
    assert list(good) == list_columns(classes)
    assert sum(float(good[f"p_{name}"]) for name in classes) == pytest.approx(1, abs=1e-5)
    assert good["label"] == max(classes, key=lambda name: float(good[f"p_{name}"]))
    assert good["warnings"] == "unknown_scale"
    assert good["error"] == bad["label"] == bad["confidence"] == ""
    assert (good["status"], bad["status"], bad["error_code"]) == ("answered", "failed", "undecodable_image")


def test_texts_of_a_csv_are_quoted_and_numbers_are_not(tiles):
    odd = (tiles / "b.png").rename(tiles / "a;=1+1.png")
    head, row = run("predict", odd, "--format", "csv").stdout.splitlines()
    assert head.startswith('"file","status","label",')
    assert re.match(rf'"{re.escape(str(odd))}","answered","\w+",0\.\d+,', row)


def test_one_picture_may_come_on_stdin(tiles, tmp_path):
    data = (tiles / "b.png").read_bytes()
    item, named = json.loads(run("predict", "-", tiles / "b.png", "--format", "json", stdin=data).stdout)
    assert (item.pop("file"), named.pop("file")) == ("-", str(tiles / "b.png")) and item == named
    assert run("attention", "-", "-o", tmp_path / "map.json", stdin=data).exit_code == 0
    assert json.loads((tmp_path / "map.json").read_text())["prediction"]["input"] == item["input"]
    assert "-: the file is empty" in run("predict", "-").stderr


def answer_instead(monkeypatch: pytest.MonkeyPatch, artifact: Path, status: int, answer: object) -> None:
    """Whatever address is given, this is what answers there."""
    card = json.dumps(json.loads((artifact / "manifest.json").read_bytes()))

    def reply(request: httpx.Request) -> httpx.Response:
        if request.url.path == "/model":
            return httpx.Response(200, text=card)
        return httpx.Response(status, json=answer, headers={"Content-Type": "application/problem+json"})

    @asynccontextmanager
    async def connect(url: str, api_key: str | None) -> AsyncIterator[httpx.AsyncClient]:
        async with httpx.AsyncClient(base_url=url, transport=httpx.MockTransport(reply)) as client:
            yield client

    monkeypatch.setattr("app.client.connect", connect)


@pytest.mark.parametrize("form", ["table", "csv"])
@pytest.mark.parametrize(
    ("status", "answer"),
    [
        (200, PREDICTION | {"label": "bad \x1b]0;pwned\x07"}),
        (200, PREDICTION | {"reasons": [{"code": "bad \x1b]0;pwned\x07", "text": ""}]}),
        (415, write_problem("unsupported_format", "bad \x1b]0;pwned\x07")),
        (422, write_problem("invalid_parameter", "bad \x1b]0;pwned\x07")),
    ],
)
def test_no_text_of_a_server_commands_the_terminal(tiles, artifact, monkeypatch, form, status, answer):
    answer_instead(monkeypatch, artifact, status, answer)
    result = run("predict", tiles / "b.png", "--url", "http://there", "--format", form)
    assert r"bad \x1b]0;pwned\x07" in result.output
    assert "\x1b" not in result.output and "\x07" not in result.output


def test_rows_come_one_by_one(tiles):
    """The last picture is a pipe, of which nothing can be read before the test has read the first row."""
    os.mkfifo(tiles / "pipe")
    command = [sys.executable, "-m", "app", "predict", *[str(tiles / "b.png")] * 9, str(tiles / "pipe")]
    with subprocess.Popen([*command, "--format", "jsonl"], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        patience = threading.Timer(120, process.kill)  # or a row that doesn't come would be waited for without an end
        patience.start()
        first = json.loads(process.stdout.readline())
        patience.cancel()
        (tiles / "pipe").write_bytes((tiles / "b.png").read_bytes())
        rows = [first, *map(json.loads, process.stdout)]
    assert process.returncode == 0
    assert [row.pop("file") for row in rows] == [*[str(tiles / "b.png")] * 9, str(tiles / "pipe")]
    assert all(row == rows[0] for row in rows)


def test_rows_go_to_stdout_while_progress_is_shown(tiles):
    command = [sys.executable, "-m", "app", "predict", str(tiles / "b.png"), "--format", "csv"]
    ended = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"FORCE_COLOR": "1"})
    assert "predicting" in ended.stderr
    assert ended.stdout.count("\n") == 2


def test_a_name_that_is_no_utf8_ends_no_csv(tiles):
    odd = os.fsdecode(os.fsencode(tiles) + b"/bad\xff.png")
    command = [sys.executable, "-m", "app", "predict", odd, str(tiles / "b.png"), "--format", "csv"]
    strict = os.environ | {"PYTHONIOENCODING": "utf-8:strict"}
    ended = subprocess.run(command, capture_output=True, encoding="utf-8", env=strict)
    assert [row["file"] for row in csv.DictReader(io.StringIO(ended.stdout))] == [
        str(tiles / r"bad\udcff.png"),
        str(tiles / "b.png"),
    ], "the first as a table and JSON have it"
    assert ended.returncode == 1 and ended.stderr.endswith("tissue: 1 of 2 failed\n")


@pytest.mark.parametrize(("form", "kept"), [("csv", 0), ("jsonl", 0), ("json", 3), ("table", 3)])
def test_rows_that_are_printed_are_not_kept(tiles, artifact, form, kept):
    pictures = [tiles / "b.png", tiles / "broken.png", tiles / "deeper/a.TIF"]
    here = open_here(Settings(artifact=artifact))
    outcome = asyncio.run(ask_for_all(here, pictures, {"mpp": None}, form, False, False, lambda: None))
    assert (len(outcome.unprinted), outcome.count, list(outcome.failed)) == (kept, 3, [str(tiles / "broken.png")])


@pytest.fixture
def field(tmp_path: Path) -> Path:
    """Three by two tiles, and not enough at the right and at the bottom for more."""
    file = tmp_path / "field.png"
    Image.fromarray(draw_tile("Tumor", 7, 520)[:340]).save(file)
    return file


@pytest.mark.parametrize(("mpp", "side"), [(0.495, 150), (0.51, 146), (0.75, 99)])
def test_each_tile_of_a_grid_is_answered_as_if_it_came_alone(field, tmp_path, service, mpp, side):
    arguments = ["--mpp", mpp, "--format", "json"]
    items = json.loads(run("predict", field, "--grid", *arguments).stdout)
    there = run("predict", field, "--grid", *arguments, "--url", service, "--api-key", KEY)
    assert json.loads(there.stdout) == items
    assert [item.pop("box") for item in items] == [
        {"x": x, "y": y, "width": side, "height": side}
        for y in range(0, 341 - side, side)
        for x in range(0, 521 - side, side)
    ]
    with Image.open(field) as picture:
        for n in range(len(items)):
            x, y = n % (520 // side) * side, n // (520 // side) * side
            picture.crop((x, y, x + side, y + side)).save(tmp_path / f"{n:02}.png")
    alone = json.loads(run("predict", *sorted(tmp_path.glob("[0-9]*.png")), *arguments).stdout)
    for item in items + alone:
        del item["file"], item["input"]["sha256"]  # of bytes that another encoder may write
    assert alone == items


def test_grid_knows_the_scale_from_the_file_as_well(field, tmp_path):
    tagged = tmp_path / "tagged.png"
    with Image.open(field) as picture:
        picture.save(tagged, dpi=(25_400 / 0.495, 25_400 / 0.495))
    rows = csv.DictReader(io.StringIO(run("predict", tagged, "--grid", "--format", "csv").stdout))
    assert [(row["box_x"], row["box_y"]) for row in rows] == [(x, y) for y in ("0", "150") for x in ("0", "150", "300")]
    result = run("predict", field, tagged, "--grid")
    assert result.exit_code == 1 and "tagged.png at 300, 150" in result.stdout
    assert re.search(rf"{field}: The file doesn't tell its scale.* --mpp", result.stderr)


@pytest.mark.parametrize(("arguments", "source"), [([], "tag"), (["--mpp", "0.5"], "request")])
def test_grid_says_of_each_tile_where_it_comes_from(field, tmp_path, arguments, source):
    tagged = tmp_path / "tagged.tif"
    with Image.open(field) as picture:
        picture.save(tagged, dpi=(25_400 / 0.495, 25_400 / 0.495))
    for item in json.loads(run("predict", tagged, "--grid", "--format", "json", *arguments).stdout):
        told = {name: item["input"][name] for name in ("format", "mpp_source", "sha256")}
        assert told == {
            "format": "TIFF",
            "mpp_source": source,
            "sha256": hashlib.sha256(tagged.read_bytes()).hexdigest(),
        }


def test_grid_passes_on_what_is_to_say_of_the_file(field, tmp_path):
    path = tmp_path / "faint.png"
    with Image.open(field) as picture:
        faint = picture.convert("RGBA")
        faint.putalpha(200)
        faint.save(path)
    items = json.loads(run("predict", path, "--grid", "--mpp", "0.495", "--format", "json").stdout)
    assert len(items) == 6 and all("transparency" in {one["code"] for one in item["warnings"]} for item in items)


def test_grid_is_drawn_for_qupath(field, artifact):
    colors = {known.name: list(bytes.fromhex(known.color[1:])) for known in read_manifest(artifact).classes}
    items = json.loads(run("predict", field, "--grid", "--mpp", "0.495", "--format", "json").stdout)
    drawn = json.loads(run("predict", field, "--grid", "--mpp", "0.495", "--format", "geojson").stdout)
    assert drawn["type"] == "FeatureCollection" and len(drawn["features"]) == len(items) == 6
    assert drawn["features"][4]["geometry"] == {
        "type": "Polygon",
        "coordinates": [[[150, 150], [300, 150], [300, 300], [150, 300], [150, 150]]],
    }
    for feature, item in zip(drawn["features"], items, strict=True):
        properties = feature["properties"]
        assert properties["objectType"] == "tile"
        assert properties["classification"] == {"name": item["label"], "color": colors[item["label"]]}
        assert properties["measurements"]["confidence"] == item["confidence"]
        assert properties["measurements"][f"p_{item['label']}"] == item["probabilities"][item["label"]]


def test_predict_keeps_the_features_of_each_picture(tiles, tmp_path):
    pictures = [tiles / "b.png", tiles / "broken.png", tiles / "deeper" / "a.TIF"]
    result = run("predict", *pictures, "--features", tmp_path / "features.npy")
    assert result.exit_code == 1, "one is broken"
    rows = np.load(tmp_path / "features.npy")
    assert rows.shape == (3, 32) and np.isnan(rows).all(axis=1).tolist() == [False, True, False]
    assert is_one_sentence(run("predict", tiles / "b.png", "--features", tmp_path / "features.csv"), 2)


def test_features_go_to_the_very_file_that_is_named(tiles, tmp_path):
    file = tmp_path / "features.NPY"
    file.write_bytes(b"of another run, " * 10_000)
    assert run("predict", tiles / "b.png", "--features", file).exit_code == 0
    assert [path.name for path in tmp_path.glob("*.*")] == ["features.NPY"]
    assert np.load(file).shape == (1, 32)


@pytest.mark.parametrize("place", ["nowhere/rows.npy", "deeper.npy", "x" * 300 + ".npy"])
def test_nothing_is_asked_whose_features_cannot_be_written(tiles, place):
    (tiles / "deeper").rename(tiles / "deeper.npy")
    result = run("predict", tiles / "b.png", "--features", tiles / place, "--url", "http://127.0.0.1:1")
    assert is_one_sentence(result) and f"{tiles / place} can't be written: " in result.stderr


def test_features_that_were_there_outlive_a_run_that_fails(tiles, tmp_path):
    (tmp_path / "rows.npy").write_bytes(b"of another run")
    run("predict", tiles / "b.png", "--features", tmp_path / "rows.npy", "--url", "http://127.0.0.1:1")
    assert (tmp_path / "rows.npy").read_bytes() == b"of another run"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is always full")
def test_answers_are_not_lost_with_the_features(tiles, tmp_path):
    (tmp_path / "rows.npy").symlink_to("/dev/full")
    pictures = [tiles / "b.png", tiles / "broken.png"]
    result = run("predict", *pictures, "--format", "json", "--features", tmp_path / "rows.npy")
    assert [item["file"] for item in json.loads(result.stdout)] == [str(picture) for picture in pictures]
    broken, unwritten = result.stderr.splitlines()
    assert result.exit_code == 1 and broken.startswith(f"{tiles / 'broken.png'}: ")
    assert unwritten == f"tissue: {tmp_path / 'rows.npy'} can't be written: No space left on device"


def test_names_command_no_terminal_and_long_ones_no_traceback(tiles):
    odd = (tiles / "b.png").rename(tiles / "\x1b[31mb.png")
    result = run("predict", odd, tiles / ("x" * 300 + ".png"))
    assert "\x1b" not in result.stdout + result.stderr and r"\x1b[31mb.png" in result.stdout
    assert result.exit_code == 1 and result.stderr.endswith("tissue: 1 of 2 failed\n")


def test_predict_table_shows_names_as_they_are(tiles):
    odd = (tiles / "b.png").rename(tiles / "[red]1[5].png")
    result = run("predict", odd)
    assert result.exit_code == 0
    assert "[red]1[5].png" in result.stdout


def test_folders_and_globs_are_the_pictures_in_them(tiles):
    b, broken, deep = tiles / "b.png", tiles / "broken.png", tiles / "deeper/a.TIF"
    assert find_pictures([str(tiles)]) == [b, broken, deep]
    assert find_pictures([f"{tiles}/*"]) == [b, broken]
    assert find_pictures([f"{tiles}/**/*.TIF", str(b)]) == [deep, b]
    assert find_pictures([str(tiles / "notes.txt")]) == [tiles / "notes.txt"], "named, so to be complained about"
    bracketed, single = b.rename(tiles / "[1].png"), broken.rename(tiles / "1.png")
    assert find_pictures([str(bracketed), str(single)]) == [bracketed, single], "a file is no glob"
    assert find_pictures([f"{tiles}/*.webp"]) == [tiles / "*.webp"]
    assert "matches nothing" in run("predict", f"{tiles}/*.webp").stderr


def test_links_that_go_round_in_circles_lead_to_each_file_once(tiles):
    (tiles / "deeper/again").symlink_to(tiles)
    (tiles / "link.png").symlink_to(tiles / "b.png")
    expected = [tiles / name for name in ("b.png", "broken.png", "link.png")]
    assert find_pictures([f"{tiles}/**/*.png"]) == find_pictures([f"{tiles}/*.png"]) == expected
    assert find_pictures([str(tiles)]) == [tiles / "b.png", tiles / "broken.png", tiles / "deeper/a.TIF", expected[2]]


def test_what_a_dot_hides_in_a_folder_is_no_picture_of_it(tiles):
    hidden = tiles / ".Trashes"
    hidden.mkdir()
    for file in (tiles / "._b.png", hidden / "c.png", tiles / "deeper/._a.TIF"):
        file.write_bytes(b"\0\5\x16\7 what a Mac keeps beside a file")
    assert find_pictures([str(tiles)]) == [tiles / "b.png", tiles / "broken.png", tiles / "deeper/a.TIF"]
    assert find_pictures([str(hidden), str(tiles / "._b.png")]) == [hidden / "c.png", tiles / "._b.png"], "named"


def test_folder_without_pictures_is_a_failure(tmp_path):
    result = run("predict", tmp_path)
    assert result.exit_code == 1
    assert "holds no picture" in result.stderr


@pytest.mark.parametrize("method", ["attention", "rollout", "evidence", "occlusion"])
def test_attention_writes_what_the_ending_says(tiles, tmp_path, method, artifact):
    grid = read_manifest(artifact).grid
    for ending in ("png", "npy", "json"):
        output = tmp_path / f"map.{ending}"
        result = run("attention", tiles / "b.png", "-o", output, "--method", method)
        assert result.exit_code == 0, result.stderr
    numbers = np.load(tmp_path / "map.npy")
    document = json.loads((tmp_path / "map.json").read_text())
    assert numbers.shape == (grid, grid)
    np.testing.assert_allclose(numbers, document["grid"], rtol=1e-6)
    assert document["method"] == method
    with Image.open(tmp_path / "map.png") as picture:
        assert method in picture.info["caption"]


def test_attention_passes_its_options_on(tiles, tmp_path, artifact):
    manifest = read_manifest(artifact)
    target = manifest.class_names[-1]
    output = tmp_path / "map.json"
    run("attention", tiles / "b.png", "-o", output, "--method", "evidence", "--target", target, "--mpp", "0.5")
    document = json.loads(output.read_text())
    assert (document["target"], document["prediction"]["input"]["mpp"]) == (target, 0.5)
    run("attention", tiles / "b.png", "-o", output, "--method", "attention", "--layer", "0", "--head", "1")
    document = json.loads(output.read_text())
    assert (document["layer"], document["head"]) == (0, 1)
    run("attention", tiles / "b.png", "-o", output, "--method", "attention", "--layout", "heads")
    shape = np.shape(json.loads(output.read_text())["grid"])
    assert shape == (manifest.layers, manifest.heads, manifest.grid, manifest.grid)


def test_attention_of_a_service_is_the_same(tiles, tmp_path, service):
    for name, options in (("here", []), ("there", ["--url", service, "--api-key", KEY])):
        assert run("attention", tiles / "b.png", "-o", tmp_path / f"{name}.png", *options).exit_code == 0
    assert (tmp_path / "here.png").read_bytes() == (tmp_path / "there.png").read_bytes()


def test_attention_reads_a_pipe_as_predict_does(tmp_path):
    reads, writes = os.pipe()
    with open(writes, "wb") as end:
        Image.fromarray(draw_tile("Tumor", 7, 64)).save(end, "PNG")  # small enough for a pipe to hold
    result = run("attention", f"/dev/fd/{reads}", "-o", tmp_path / "map.json")
    os.close(reads)
    assert result.exit_code == 0, result.stderr
    assert json.loads((tmp_path / "map.json").read_text())["prediction"]["input"]["width"] == 64


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["attention", "b.png", "-o", "nowhere/map.png"], "can't be written"),
        (["attention", "none.png", "-o", "map.png"], "the file can't be read: No such file"),
        (["attention", "x" * 300 + ".png", "-o", "map.png"], "the file can't be read: File name too long"),
        (["attention", "deeper", "-o", "map.png"], "deeper is a folder"),
        (["attention", "/dev/null", "-o", "map.png"], "the file is empty"),
        (["predict", "b.png", "--url", "http://127.0.0.1:1"], "nobody answers at http://127.0.0.1:1"),
        (["predict", "b.png", "--url", "127.0.0.1:8000"], "http://"),
        (["predict", "b.png", "--artifact", "nowhere"], "there is no folder nowhere"),
    ],
)
def test_mistakes_are_told_in_one_sentence(tiles, monkeypatch, arguments, sentence):
    monkeypatch.chdir(tiles)
    result = run(*arguments)
    assert is_one_sentence(result), result.output
    assert sentence in result.stderr
    assert result.stdout == ""


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["attention", "b.png", "-o", "map.jpg"], "must end in .png, .npy or .json"),
        (["attention", "b.png", "-o", "map.png", "--method", "attention", "--layer", "99"], "layer 99"),
        (["attention", "b.png", "-o", "map.png", "--target", "Moon"], "Moon"),
        (["predict", ""], "empty"),
        (["predict", "b.png", ""], "empty"),
        (["predict", "b.png", "--url", "http://127.0.0.1:1", "--artifact", "x"], "--artifact"),
        (["predict", "b.png", "broken.png", "b.png", "--coverage", "0.33"], "coverage"),
        (["predict", "b.png", "b.png", "--mpp", "9"], "mpp is 9"),
        (["predict", "b.png", "b.png", "--mpp", "fine"], "mpp"),
        (["predict", "b.png", "b.png", "--mpp", "9", "--grid"], "mpp is 9"),
        (["predict", "b.png", "--mpp", "fine", "--grid"], "--mpp is 'fine'"),
        (["predict", "b.png", "--grid", "--features", "rows.npy"], "--features"),
        (["predict", "-", "--features", "rows.npy"], "stdin"),
        (["predict", "b.png", "--format", "geojson"], "--grid"),
        (["predict", "b.png", "b.png", "--grid", "--format", "geojson"], "2 came"),
        (["serve", "--port", "abc"], "--port: "),
    ],
)
def test_wrong_use_is_told_in_one_sentence_and_by_the_status(tiles, monkeypatch, arguments, sentence):
    monkeypatch.chdir(tiles)
    result = run(*arguments)
    assert is_one_sentence(result, 2), result.output
    assert sentence in result.stderr
    assert result.stdout == ""


def test_unknown_variable_is_told_in_one_sentence(tiles, monkeypatch):
    monkeypatch.setenv("TISSUE_ARTEFACT", "x")
    result = run("predict", tiles / "b.png")
    assert is_one_sentence(result)
    assert "TISSUE_ARTIFACT" in result.stderr


def test_a_wrong_variable_is_called_by_its_name(monkeypatch):
    monkeypatch.setenv("TISSUE_PORT", "abc")
    result = run("serve")
    assert is_one_sentence(result) and "TISSUE_PORT: " in result.stderr


def test_wrong_key_is_told_in_one_sentence(tiles, service):
    result = run("predict", tiles, "--url", service, "--api-key", "wrong")
    assert is_one_sentence(result) and "--api-key" in result.stderr and "TISSUE_API_KEY" in result.stderr


def test_the_key_comes_from_a_variable_too(tiles, service, monkeypatch):
    monkeypatch.setenv("TISSUE_API_KEY", KEY)
    assert run("predict", tiles / "b.png", "--url", service).exit_code == 0
    assert run("predict", tiles / "b.png").exit_code == 0


def test_the_key_to_send_is_not_taken_for_one_to_ask_for(monkeypatch):
    monkeypatch.setenv("TISSUE_API_KEY", KEY)
    result = run("serve", "--port", "0")
    assert is_one_sentence(result) and "TISSUE_API_KEYS" in result.stderr


def test_serve_without_an_artefact_says_so_and_ends(tmp_path):
    command = [sys.executable, "-m", "app", "serve", "--port", "0", "--artifact", str(tmp_path)]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert ended.returncode == 1
    assert f"tissue: {tmp_path} holds no manifest.json" in ended.stderr
    assert "Traceback" not in ended.stderr


def test_a_key_that_cannot_be_used_is_not_shown(monkeypatch):
    monkeypatch.setenv("TISSUE_API_KEYS", f"{KEY},\x07{KEY}")
    result = run("doctor")
    assert is_one_sentence(result) and "no header can carry" in result.stderr
    assert KEY not in result.output


def test_keys_of_the_service_are_not_needed_without_it(tiles, monkeypatch):
    monkeypatch.setenv("TISSUE_API_KEYS", KEY)
    assert run("predict", tiles / "b.png").exit_code == 0
