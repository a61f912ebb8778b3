"""What `tissue-train` can do: data in, artefacts out."""

import json
import logging
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.logging import RichHandler
from rich.markup import escape
from rich.table import Table
from typer.core import TyperGroup

from model.artifact import read_manifest
from model.session import open_classifier
from model.vit import ViTConfig
from training import bench, compare, evaluate, fetch, figures, maps, pretrain, report, robustness, synthetic
from training.config import TILE_MPP, Compare, Fit, Pretrain, read_config
from training.data import load_usable, name_slides, scan
from training.fit import read_tiles
from training.metrics import Scores
from training.patches import look_at_held_out
from training.run import claim, cross_validate_and_keep, export_run, fit_and_export, refuse_other_settings
from training.trial import read_trial
from training.twins import find_near_duplicates


class PlainErrors(TyperGroup):
    """What the user can mend is told in a sentence; a traceback is for what only a developer can."""

    def invoke(self, ctx: Any) -> Any:  # of a class that typer has, or else click
        try:
            return super().invoke(ctx)
        except (typer.Exit, typer.Abort):  # RuntimeErrors, too
            raise
        except (ValueError, OSError, RuntimeError) as error:
            err.print(f"[red]tissue-train:[/] {escape(str(error))}", highlight=False, soft_wrap=True)
            raise typer.Exit(1) from error


cli = typer.Typer(
    cls=PlainErrors,
    help="Train, judge and export tissue classifiers.",
    no_args_is_help=True,
    add_completion=False,
)
data = typer.Typer(help="Get, check or draw labelled tiles.", no_args_is_help=True)
cli.add_typer(data, name="data")
out, err = Console(), Console(stderr=True)

Config = Annotated[Path, typer.Argument(help="A TOML file, such as configs/smoke.toml.")]
Overrides = Annotated[list[str] | None, typer.Argument(help="key=value, such as optimisation.steps=500.")]
Runs = Annotated[Path, typer.Option(help="Where runs keep their checkpoints.")]
ImageTable = Annotated[Path | None, typer.Option(help="CSV with columns file, label, slide, quality.")]
ImageMpp = Annotated[
    float | None, typer.Option(help="um/px of the images; default: that of each file's own tag, else each is a tile.")
]


@cli.callback()
def start_logging() -> None:
    logging.basicConfig(level=logging.INFO, format="%(message)s", handlers=[RichHandler(console=err, show_path=False)])


def print_result(line: str) -> None:
    """As it is: brackets of a path or a class are no markup, and a line for a machine is not broken."""
    out.print(line, soft_wrap=True, markup=False)


def print_progress(line: str) -> None:
    """Of what goes on, and not a result."""
    err.print(line, soft_wrap=True, markup=False)


@data.command("fetch")
def fetch_data(target: Annotated[Path, typer.Argument()] = Path("data/kather2016")) -> None:
    """Download the 5,000 tiles of Kather et al. 2016 (246 MB), go on where a download stopped, verify, unpack."""
    print_result(f"{fetch.fetch(fetch.KATHER_URL, target, fetch.KATHER_MD5)}")


@data.command("scan")
def scan_data(folder: Path, table: ImageTable = None) -> None:
    """List what a folder-per-class tree holds: classes, slides, unreadable files, duplicates, look-alikes."""
    scanned = scan(folder, table)
    shown = Table("class", "tiles", "slides")
    for label in scanned.classes:
        own = [record for record in scanned.records if record.label == label]
        shown.add_row(escape(label), str(len(own)), str(len(name_slides(own))))
    out.print(shown)
    for path, reason in scanned.unreadable:
        print_result(f"skipped {path}: {reason}")
    for kept, dropped in scanned.duplicates:
        print_result(f"dropped {dropped}: the same bytes as {kept}")
    records, tiles, too_small = load_usable(scanned.records, ViTConfig().tile_px, TILE_MPP)
    for reason in too_small:
        print_result(f"skipped {reason}")
    for i, j in find_near_duplicates(tiles):
        first, second = records[i].path, records[j].path
        print_result(f"look alike, kept in one fold: {first} and {second}")


@data.command("synth")
def synthesise_data(folder: Path, per_class: int = 60, seed: int = 0) -> None:
    """Draw H&E-like tiles of six kinds, for tests and demonstrations. They teach nothing about tissue."""
    synthetic.write_tree(folder, per_class, seed)


@cli.command("pretrain")
def pretrain_network(config: Config, overrides: Overrides = None, runs: Runs = Path("runs")) -> None:
    """Learn from annotated fields before the labelled tiles: classes, nuclei and glands per patch, labels by rule."""
    run = read_config(config, overrides or [], Pretrain)
    folder = runs / run.name
    refuse_other_settings(folder, run)
    cutters = pretrain.open_sources(run)
    claim(folder, run)
    model = pretrain.pretrain(run, cutters, folder)
    figures.draw_curves(folder / "curve.csv", folder / "curve.png", run.name)
    for cutter in cutters:
        if seen := look_at_held_out(model, cutter):
            figures.draw_patch_maps(seen, folder / f"held-out-{cutter.collection.task}.png")
    print_result(f'{folder / "latest.pt"}: start from it with init = "{folder / "latest.pt"}"')


@cli.command("fit")
def fit_network(config: Config, overrides: Overrides = None, runs: Runs = Path("runs")) -> None:
    """Train on labelled tiles, judge on held-out ones, export the artefact."""
    run = read_config(config, overrides or [], Fit)
    manifest = fit_and_export(run, runs / run.name)
    for metric in manifest.metrics:
        if metric.name.startswith("accuracy") and not metric.name.startswith("accuracy of bin"):
            print_result(f"{metric.name}: {metric.value:.3f} [{metric.low:.3f}, {metric.high:.3f}] ({metric.protocol})")
    print_result(f"artefact: {runs / run.name / 'artifact'}")


@cli.command("cv")
def cross_validate(config: Config, overrides: Overrides = None, runs: Runs = Path("runs")) -> None:
    """Repeated folds at random and, where slides are known, by slide; a later `fit` with split=all tells these."""
    run = read_config(config, overrides or [], Fit)
    for metric in cross_validate_and_keep(run, runs / run.name, print_progress):
        print_result(f"{metric.name}: {metric.value:.3f} [{metric.low:.3f}, {metric.high:.3f}] ({metric.protocol})")


@cli.command("compare")
def compare_networks(
    config: Config,
    page: Annotated[Path, typer.Argument(help="Where the table goes; its picture into images/ beside it.")] = Path(
        "docs/comparison.md"
    ),
    runs: Runs = Path("runs"),
    train: Annotated[bool, typer.Option(help="Only write down what is finished: --no-train.")] = True,
) -> None:
    """Several networks on the same folds: accuracy, paired differences, cost. Goes on where it was killed."""
    compare.compare(read_config(config, [], Compare), runs, page, print_progress, train)
    print_result(f"{page}")


@cli.command("export")
def export_artifact(
    config: Config,
    target: Annotated[Path, typer.Argument(help="The artefact's directory; one that is there is replaced.")],
    overrides: Overrides = None,
    runs: Runs = Path("runs"),
    fp16: Annotated[bool, typer.Option(help="Add fp16 graphs, for GPUs.")] = False,
) -> None:
    """Write the artefact of a finished run again, elsewhere or with other variants."""
    run = read_config(config, overrides or [], Fit)
    if fp16:
        run = run.model_copy(update={"card": run.card.model_copy(update={"fp16": True})})
    manifest = export_run(run, read_tiles(run), runs / run.name, target)
    for precision, variant in manifest.variants.items():
        print_result(f"{precision}: same label {variant.same_label:.4f} of {variant.n}")


@cli.command("evaluate")
def evaluate_artifact(
    artifact: Path, images: Path, table: ImageTable = None, image_mpp: ImageMpp = None, folder: Path | None = None
) -> None:
    """Score an artefact on labelled images, through the graph that is served. With --folder: JSON and pictures."""
    scores = evaluate.evaluate(artifact, images, table, image_mpp)
    print_scores(scores)
    if folder:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "scores.json").write_text(json.dumps(scores.as_dict(), indent=2))
        figures.draw_confusion(scores, folder / "confusion.png", f"{artifact.name} on {images.name}")


@cli.command("scope")
def try_scope(
    artifact: Path, folders: Annotated[list[Path], typer.Argument(help="Each a group.")], image_mpp: ImageMpp = None
) -> None:
    """Count what an artefact answers on folders of anything: ok, uncertain or out of scope, and for which reasons."""
    shown = Table("folder", "n", "ok", "uncertain", "out of scope", "not ok", "95 % interval", "reasons")
    for tally in evaluate.tally_scope(artifact, folders, image_mpp):
        share, low, high = tally.not_ok()
        counts = [str(tally.verdicts[verdict]) for verdict in ("ok", "uncertain", "out_of_scope")]
        reasons = ", ".join(f"{code} {count}" for code, count in tally.reasons.most_common())
        name = f"{tally.folder} ({tally.refused} refused)" if tally.refused else str(tally.folder)
        shown.add_row(escape(name), str(tally.n), *counts, f"{share:.1%}", f"{low:.1%} to {high:.1%}", reasons)
    out.print(shown)


def print_scores(scores: Scores) -> None:
    shown = Table("", "value", "95 % interval", "tiles or slides")
    for name, estimate in scores.pairs():
        shown.add_row(
            escape(name), f"{estimate.value:.3f}", f"{estimate.low:.3f} to {estimate.high:.3f}", str(estimate.n)
        )
    out.print(shown)


@cli.command("report")
def write_report(artifact: Path, target: Annotated[Path, typer.Argument()] = Path("docs/model-card.md")) -> None:
    """Write the model card from the artefact's manifest."""
    report.write_card(read_manifest(artifact), target)


@cli.command("judge-maps")
def judge_maps(
    artifact: Path,
    tiles: Annotated[Path, typer.Option(help="A folder per class, or one of images without classes.")],
    folder: Annotated[Path, typer.Option(help="Where the table and the pictures go.")],
    table: ImageTable = None,
    image_mpp: ImageMpp = None,
    tiles_per_class: Annotated[int, typer.Option(min=1, help="Most tiles of a class that removal is tried on.")] = 15,
    mosaics: Annotated[int, typer.Option(min=1, help="Most mosaics of four tiles.")] = 120,
    glands: Annotated[Path | None, typer.Option(help="CSV with columns image, mask, patient: outlined glands.")] = None,
    glands_mpp: Annotated[float, typer.Option(help="um/px of the fields with outlined glands.")] = 0.62,
    learnt: Annotated[bool, typer.Option("--learnt/--unseen", help="Was the network trained on these?")] = True,
    write: Annotated[bool, typer.Option("--write", help="Keep the scores, and the default, in the manifest.")] = False,
    seed: int = 0,
) -> None:
    """Score every kind of map, through the exported graph, beside maps that no model drew."""
    classifier = open_classifier(artifact, device="cpu", intra_threads=1)
    trial = read_trial(classifier, tiles, table, image_mpp, tiles_per_class, learnt, seed)
    fields = maps.read_outlined(glands, glands_mpp, classifier.manifest) if glands else []
    shuffled = maps.shuffle_weights(classifier, artifact, seed)
    judgement = maps.judge_maps(classifier, shuffled, trial, tiles_per_class, mosaics, seed, fields)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "maps.json").write_text(judgement.judged.model_dump_json(indent=2) + "\n")
    (folder / "maps.md").write_text(report.render_judged(judgement.judged) + "\n")
    figures.draw_map_scores(judgement.judged, folder / "scores.png")
    figures.draw_removal(judgement.curves, folder / "removal.png")
    if write:
        maps.write_into_manifest(artifact, judgement.judged)
    print_result(report.conclude(judgement.judged))


@cli.command("robustness")
def measure_robustness(
    artifacts: Annotated[list[Path], typer.Argument(help="One artefact, or several to compare.")],
    tiles: Annotated[Path, typer.Option(help="A folder per class, or one of images without classes.")],
    folder: Annotated[Path, typer.Option(help="Where the table and the pictures go.")],
    table: ImageTable = None,
    image_mpp: ImageMpp = None,
    tiles_per_class: Annotated[int, typer.Option(min=2, help="Most tiles of a class.")] = 15,
    learnt: Annotated[bool, typer.Option("--learnt/--unseen", help="Were the networks trained on these?")] = True,
    seed: int = 0,
) -> None:
    """What is left of the accuracy when patches are missing, tiles shuffled, attacked, or badly stained and scanned."""
    rows, protocol = robustness.measure(artifacts, tiles, table, image_mpp, tiles_per_class, learnt, seed)
    robustness.write_rows(rows, folder / "robustness.csv")
    figures.draw_robustness(rows, folder, protocol)
    print_result(f"{len(rows)} rows: {folder / 'robustness.csv'}")


@cli.command("bench")
def measure_speed(config: Config, overrides: Overrides = None, steps: int = 20) -> None:
    """Images/s of the training loop against bare passes of the network, and the memory it takes."""
    speeds = bench.measure(read_config(config, overrides or [], Fit), steps)
    print_result(
        f"bare {speeds.bare_images_per_s:.0f} images/s, loop {speeds.loop_images_per_s:.0f} images/s, "
        f"share {speeds.share:.2f}, peak memory {speeds.peak_memory_mib:.0f} MiB"
    )
