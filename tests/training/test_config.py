import re
from pathlib import Path
from typing import Any

import pytest

from model.convnets import ConvMixerConfig, ResNetConfig
from model.msht import MSHTConfig
from model.vit import ViTConfig
from training.config import BadConfig, Compare, Distil, Fit, Optimisation, Pretrain, read_config
from training.data import read_table

SHIPPED = Path(__file__).parents[2] / "configs" / "default.toml"
MINIMAL = 'name = "x"\n[data]\nfolder = "tiles"\ntile_mpp = 0.495\n'


@pytest.fixture
def write(tmp_path):
    def write_config(text):
        path = tmp_path / "x.toml"
        path.write_text(text)
        return path

    return write_config


def test_labels_by_looking_name_classes_of_the_shipped_artefact():
    rows = read_table(SHIPPED.with_name("slide_tiles.csv"))
    assert len(rows) == 268
    assert {row["label"] for row in rows.values()} < set(read_config(SHIPPED, [], Fit).data.classes or [])


def test_a_minimal_file_is_a_whole_run(write):
    config = read_config(write(MINIMAL), [], Fit)
    assert config.model == ViTConfig()
    assert config.optimisation.steps == 2000


def test_the_command_line_beats_the_file(write):
    path = write(MINIMAL + "[optimisation]\nsteps = 10\n[model]\nlayers = 2\n")
    overrides = ["optimisation.steps=20", "model.stem=conv", "augment.crop=[0.5, 0.9]", "split=all"]
    config = read_config(path, overrides, Fit)
    assert config.optimisation.steps == 20
    assert config.model == ViTConfig(layers=2, stem="conv")
    assert config.augment.crop == (0.5, 0.9)
    assert config.split == "all"


def test_the_command_line_takes_a_key_away(write):
    path = write('init = "a.pt"\n' + MINIMAL + "[optimisation]\nsteps = 10\n")
    config = read_config(path, ["init=", "optimisation.steps=", "optimisation.seed="], Fit)
    assert config.init is None and config.optimisation == Optimisation()


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optimisation.stpes=5", r"unknown key 'stpes'; the nearest known one is 'steps'"),
        ("model.witdh=5", r"unknown key 'witdh'; the nearest known one is 'width'"),
        ("optimiser.steps=5", r"unknown key 'optimiser'; the nearest known one is 'optimisation'"),
        ("optimisation.steps=many", "optimisation.steps"),
        ("optimisation.steps=0", "optimisation.steps"),
        ("augment.stain=-1", "augment.stain"),
        ("model.heads=5", "width 192 is not a multiple of heads 5"),
        ("steps", "no key=value"),
        ("model.architecture=vgg", "'vit', 'msht', 'poolformer', 'convmixer', 'resnet'"),
        ("name.x=5", "'name.x=5': 'name' is no section; expected one"),
        ("name=../escape", r"name: it is the run's folder among the runs, .* '\.\./escape' would lie outside"),
        ("name=/tmp/escape", "would lie outside"),
        ('name=""', "would lie outside"),
        ("data.clases=[]", r"unknown key 'clases'; the nearest known one is 'classes'"),
    ],
)
def test_what_is_wrong_is_refused_by_name(write, override, message):
    with pytest.raises(BadConfig, match=message):
        read_config(write(MINIMAL), [override], Fit)


def test_each_architecture_takes_its_own_sizes_and_no_others(write):
    path = write(MINIMAL + '[model]\narchitecture = "msht"\nwidth = 64\nchannels = [8, 16, 24, 32]\n')
    assert read_config(path, [], Fit).model == MSHTConfig(width=64, channels=(8, 16, 24, 32))
    with pytest.raises(BadConfig, match=r"\[model\]: unknown key 'layers'"):
        read_config(path, ["model.layers=3"], Fit)
    path = write(MINIMAL + '[distil]\nteacher = { architecture = "convmixer", blocks = 2 }\n')
    assert read_config(path, ["distil.kind=hard"], Fit).distil == Distil(teacher=ConvMixerConfig(blocks=2), kind="hard")
    with pytest.raises(BadConfig, match=r"\[teacher\]: unknown key 'depth'"):
        read_config(path, ["distil.teacher.depth=3"], Fit)


def test_only_networks_with_tokens_can_drop_some_or_learn_what_lies_in_each(write):
    path = write(MINIMAL + '[model]\narchitecture = "resnet"\n')
    assert read_config(path, [], Fit).model == ResNetConfig()
    with pytest.raises(BadConfig, match="resnet has no tokens to drop"):
        read_config(path, ["optimisation.token_drop=0.5"], Fit)
    text = 'name = "x"\n[[sources]]\nkind = "classes"\nfolder = "a"\nshare = 1.0\n[model]\narchitecture = "resnet"\n'
    with pytest.raises(BadConfig, match="'vit', 'msht'"):
        read_config(write(text), [], Pretrain)


def test_another_network_takes_the_place_of_the_files_on_the_command_line(write):
    path = write(MINIMAL + '[model]\nstem = "conv"\nlayers = 6\n')
    assert read_config(path, ['model={architecture="msht", pool="both"}'], Fit).model == MSHTConfig(pool="both")


def test_keys_inside_lists_are_checked_as_well(write):
    text = 'name = "x"\n[[sources]]\nkind = "classes"\nfolder = "a"\nshaer = 1.0\n'
    with pytest.raises(BadConfig, match=r"unknown key 'shaer'; the nearest known one is 'share'"):
        read_config(write(text), [], Pretrain)


@pytest.mark.parametrize("data", ["", "generate = 4\n", "image_mpp = 0.25\n", "tile_mpp = 0.7\n"])
def test_the_scale_of_images_is_stated_or_they_are_drawn(write, data):
    path = write(f'name = "x"\n[data]\nfolder = "tiles"\n{data}')
    if data:
        assert read_config(path, [], Fit).data.tile_mpp == (0.7 if "tile_mpp" in data else 0.495)
    else:
        with pytest.raises(
            BadConfig, match=r"^\S+: data: the scale of the images is not stated: set image_mpp, .* \(150\)$"
        ):
            read_config(path, [], Fit)


def test_only_layers_that_come_from_somewhere_are_frozen(write):
    with pytest.raises(BadConfig, match="without init they come at random"):
        read_config(write(MINIMAL), ['optimisation.frozen=["blocks."]'], Fit)
    assert read_config(write(MINIMAL), ['optimisation.frozen=["blocks."]', "init=a.pt"], Fit).optimisation.frozen
    with pytest.raises(BadConfig, match="without init they come at random"):
        read_config(SHIPPED.with_name("pretrain.toml"), ["init="], Pretrain)


@pytest.mark.parametrize("key", ["crop=[0.5, 1.0]", "flips=false", "mixup=0.1", "cutmix=0.1"])
def test_pretraining_takes_no_augmentation_that_it_would_not_do(key):
    with pytest.raises(BadConfig, match=rf"take \['{key.partition('=')[0]}'\] out of \[augment\]"):
        read_config(SHIPPED.with_name("pretrain.toml"), [f"augment.{key}"], Pretrain)


@pytest.mark.parametrize("path", sorted(SHIPPED.parent.glob("*.toml")), ids=lambda path: path.stem)
def test_every_config_is_one(path):
    kinds: dict[str, Any] = {"pretrain": Pretrain, "compare": Compare}
    assert read_config(path, [], kinds.get(path.stem, Fit)).name == path.stem


def test_broken_toml_is_named(write):
    with pytest.raises(BadConfig, match="not valid TOML"):
        read_config(write("name = "), [], Fit)


def test_a_file_may_begin_with_the_mark_that_editors_write(tmp_path):
    (tmp_path / "x.toml").write_text(MINIMAL, encoding="utf-8-sig")
    assert read_config(tmp_path / "x.toml", [], Fit).name == "x"
    (tmp_path / "x.toml").write_bytes(b'name = "\xff"\n')
    with pytest.raises(BadConfig, match=r"x\.toml is not valid TOML"):
        read_config(tmp_path / "x.toml", [], Fit)


def test_every_tile_that_the_shipped_network_learnt_from_is_accounted_for():
    source = read_config(SHIPPED, [], Fit).card.data[0]
    qualities = re.findall(r"(\d+) (?:with their own|enlarged|recompressed)", source.origin)
    slides = re.findall(r"known of (\d+)", source.origin)
    assert (len(qualities), sum(map(int, qualities))) == (3, source.n)
    assert (len(slides), sum(map(int, slides))) == (2, source.n)
    assert "\n" not in source.origin  # a cell of the card's table
