from contextlib import nullcontext

import numpy as np
import pytest
import torch

from model.graph import fill_removed
from model.vit import ViT, ViTConfig
from training import checkpoint
from training.fit import fit_tiles, mean_loss, predict, read_tiles, see
from training.train import FrozenAtRandom

HIDDEN = "blocks.0.mlp.fc1.weight"


@pytest.fixture(scope="module")
def tiles(small_fit):
    return read_tiles(small_fit)


def test_tiles_come_in_the_order_of_the_configs_classes(small_fit, tiles):
    assert tiles.classes == ["Tumor", "Stroma", "Lympho"]
    assert tiles.tiles.shape == (30, 150, 150, 3)
    assert [tiles.classes[t] for t in tiles.targets] == [record.label for record in tiles.records]


def test_each_head_learns_as_if_it_were_alone():
    first, second = (torch.randn(5, 3, requires_grad=True) for _ in range(2))
    targets = torch.eye(3)[[0, 1, 2, 0, 1]]
    mean_loss((first, second), targets, 0.1).backward()
    beside_another, first.grad = first.grad, None
    (mean_loss((first,), targets, 0.1) / 2).backward()
    torch.testing.assert_close(beside_another, first.grad)
    assert second.grad is not None and second.grad.abs().sum() > 0


def test_tiles_are_drawn_where_the_config_says_so_and_only_once(small_fit, tmp_path):
    data = small_fit.data.model_copy(update={"folder": tmp_path / "drawn", "generate": 2})
    config = small_fit.model_copy(update={"data": data})
    assert len(read_tiles(config).tiles) == 6
    (next((tmp_path / "drawn").rglob("*TUMOR/*.png"))).unlink()
    assert len(read_tiles(config).tiles) == 5


def test_frozen_layers_that_the_weights_did_not_fill_are_refused(small_fit, tiles, tmp_path):
    earlier = ViT(small_fit.model, classes=3).state_dict()
    there = {name: tensor for name, tensor in earlier.items() if not name.startswith("blocks.1.")}
    checkpoint.save({"weights": there}, tmp_path / "earlier.pt")
    for frozen, refused in (["blocks.0."], False), (["blocks."], True):
        how = small_fit.optimisation.model_copy(update={"frozen": frozen, "steps": 1})
        config = small_fit.model_copy(update={"init": tmp_path / "earlier.pt", "optimisation": how})
        with pytest.raises(FrozenAtRandom, match=r"blocks\.1\.") if refused else nullcontext():
            fit_tiles(config, tiles, tmp_path / str(refused), None)


def test_training_starts_from_an_earlier_run_with_another_head(small_fit, tiles, tmp_path, caplog):
    torch.manual_seed(5)
    earlier = ViT(small_fit.model, classes=7)
    checkpoint.save({"weights": {f"vit.{k}": v for k, v in earlier.state_dict().items()}}, tmp_path / "earlier.pt")
    still = small_fit.optimisation.model_copy(update={"learning_rate": 1e-12, "steps": 1})
    config = small_fit.model_copy(update={"init": tmp_path / "earlier.pt", "optimisation": still})
    with caplog.at_level("INFO"):
        vit = fit_tiles(config, tiles, tmp_path / "run", None)
    torch.testing.assert_close(vit.get_parameter(HIDDEN), earlier.get_parameter(HIDDEN))
    assert "new: colour_head, early_head, head; not used: colour_head, early_head, head" in caplog.text


def test_answers_do_not_depend_on_the_batch(small_fit, tiles):
    torch.manual_seed(0)
    vit = ViT(small_fit.model, classes=3)
    torch.nn.init.normal_(vit.head.weight)
    np.testing.assert_allclose(predict(vit, tiles.tiles, batch=7), predict(vit, tiles.tiles, batch=30), atol=1e-5)


@pytest.mark.parametrize("stem", ["patch", "efficientnet"])
def test_a_stem_that_sees_holes_learns_what_they_look_like(stem):
    """As `keep` makes them in the exported graph; half of the images stay whole, for that is how they will come."""
    torch.manual_seed(0)
    net = ViT(ViTConfig(stem=stem, width=24, heads=3, layers=1), classes=2).eval()
    seen: dict[str, torch.Tensor] = {}
    net.register_forward_pre_hook(
        lambda _, images, options: seen.update(images=images[0], visible=options["visible"]), with_kwargs=True
    )
    images = torch.rand(16, 3, 150, 150)
    see(net, images, token_drop=0.5)
    stays = torch.zeros(16, 100, dtype=torch.bool).scatter(1, seen["visible"], value=True)
    untouched = (seen["images"] == images).flatten(1).all(dim=1)
    with_holes = (seen["images"] == fill_removed(images, stays)).flatten(1).all(dim=1)
    assert (untouched ^ with_holes).all()
    assert 2 < untouched.sum() < 14 if stem == "efficientnet" else untouched.all()
