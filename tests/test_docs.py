"""The documents promise what the code does: every setting, route, code, command and warning stands in them."""

import re
from pathlib import Path

import pytest
import typer

from app.__main__ import cli as tissue
from app.errors import HTTP_KINDS, KINDS
from app.routes import router
from app.settings import CLIENT_KEY, PREFIX, SHIPPED_ARTIFACT, Settings
from training.commands import cli as tissue_train

ROOT = Path(__file__).parents[1]
README, API = (ROOT / "README.md").read_text(), (ROOT / "docs" / "api.md").read_text()
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def test_every_setting_stands_in_the_readme_as_the_code_has_it():
    for name, field in Settings.model_fields.items():
        assert f"| `{PREFIX}{name.upper()}` |" in README
        assert f"| {field.description} |" in README


def test_the_readme_names_no_setting_that_is_none():
    known = {PREFIX + name.upper() for name in Settings.model_fields}
    assert set(re.findall(r"`(TISSUE_[A-Z_]+)", README + API)) - {PREFIX, CLIENT_KEY} <= known


def test_every_error_code_and_its_status_stand_in_the_api_document():
    for kind in (*KINDS.values(), *HTTP_KINDS.values()):
        assert f"| {kind.status} | `{kind.code}` |" in API


def test_every_route_stands_in_the_api_document():
    for route in router.routes:
        assert f"`{route.path}`" in API or f" {route.path}`" in API, route.path  # type: ignore[attr-defined]


def test_every_warning_of_a_picture_stands_in_the_api_document():
    codes = re.findall(r'Note\(\s*"(\w+)"', (ROOT / "model" / "pixels.py").read_text())
    assert len(set(codes)) > 5
    for code in codes:
        assert f"| `{code}` |" in API


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_commands_in_the_documents_exist(document):
    known = {"tissue": names_of(tissue), "tissue-train": names_of(tissue_train)}
    for program, command in re.findall(
        r"^(?:TISSUE_\w+=\S+ )?(tissue(?:-train)?) ([a-z-]+)", document.read_text(), re.M
    ):
        assert command in known[program], f"{program} {command}"


def names_of(cli: typer.Typer) -> set[str]:
    commands = {command.name or getattr(command.callback, "__name__", "") for command in cli.registered_commands}
    return commands | {str(group.name) for group in cli.registered_groups}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_within_the_project_lead_somewhere(document):
    for target in re.findall(r"\]\(([^)#:]+)\)", document.read_text()):
        assert (document.parent / target).exists(), target


@pytest.mark.parametrize("config", sorted((ROOT / "configs").glob("*.toml")), ids=lambda path: path.name)
def test_every_config_is_valid_and_opens_with_its_command(config):
    from training.config import Compare, Fit, Pretrain, read_config

    commands = [line for line in config.read_text().splitlines() if not line.startswith("# tissue-train data fetch")]
    assert re.match(r"# tissue-train (fit|pretrain|cv|compare) configs/[a-z0-9-]+\.toml( |$)", commands[0])
    if "[[sources]]" in config.read_text():
        read_config(config, [], Pretrain)
    elif "[[networks]]" in config.read_text():
        read_config(config, [], Compare)
    else:
        read_config(config, [], Fit)


def test_the_model_card_is_that_of_the_shipped_artefact():
    from model.artifact import read_manifest
    from training.report import render_card

    assert (ROOT / "docs" / "model-card.md").read_text() == render_card(read_manifest(SHIPPED_ARTIFACT))
