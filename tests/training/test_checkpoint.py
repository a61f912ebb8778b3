import errno

import pytest
import torch
from safetensors.torch import save_file

from model.vit import ViT, ViTConfig
from training.checkpoint import (
    CheckpointNotWritten,
    UnreadableCheckpoint,
    fit_kernels,
    fit_positions,
    load,
    name_modules,
    save,
    start_from,
    write_atomically,
)

CONFIG = ViTConfig(tile_px=60, width=24, layers=2, heads=3)


def make_vit(seed, classes=3, **changes):
    torch.manual_seed(seed)
    return ViT(ViTConfig(**{"tile_px": 60, "width": 24, "layers": 2, "heads": 3, **changes}), classes)


def test_a_checkpoint_reads_back(tmp_path):
    state = {"step": 3, "weights": {"a": torch.ones(2)}, "curve": [{"loss": 0.5}]}
    save(state, tmp_path / "x" / "latest.pt")
    found = load(tmp_path / "x" / "latest.pt")
    assert found["step"] == 3 and found["curve"] == [{"loss": 0.5}]
    assert torch.equal(found["weights"]["a"], torch.ones(2))


def test_a_full_disk_leaves_the_old_checkpoint_and_says_so(tmp_path):
    path = tmp_path / "latest.pt"
    save({"step": 1}, path)

    def fill_disk(file):
        file.write(b"half of it")
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(CheckpointNotWritten, match=r"No space left on device\); the one before it is untouched"):
        write_atomically(path, fill_disk)
    assert load(path)["step"] == 1
    assert [p.name for p in tmp_path.iterdir()] == ["latest.pt"]


def test_pickled_code_is_never_run(tmp_path):
    class Evil:
        def __reduce__(self):
            return (eval, ("1/0",))

    torch.save({"weights": Evil()}, tmp_path / "evil.pt")
    with pytest.raises(UnreadableCheckpoint, match="no checkpoint of this project"):
        load(tmp_path / "evil.pt")


@pytest.mark.parametrize("content", [b"", b"not a checkpoint"])
def test_damaged_and_missing_files_are_refused(tmp_path, content):
    (tmp_path / "x.pt").write_bytes(content)
    with pytest.raises(UnreadableCheckpoint, match="damaged"):
        load(tmp_path / "x.pt")
    with pytest.raises(UnreadableCheckpoint, match="there is no checkpoint"):
        load(tmp_path / "y.pt")


def test_a_head_of_another_size_stays_and_is_listed(tmp_path):
    theirs, ours = make_vit(1, classes=5), make_vit(2, classes=3)
    head = ours.head.weight.clone()
    save({"weights": theirs.state_dict()}, tmp_path / "x.pt")
    missing, unused = start_from(ours, tmp_path / "x.pt")
    assert missing == unused == ["head.bias", "head.weight"]
    assert torch.equal(ours.head.weight, head)
    assert torch.equal(ours.blocks[1].mlp.fc1.weight, theirs.blocks[1].mlp.fc1.weight)


def test_a_timm_named_file_with_another_grid_is_fitted(tmp_path):
    theirs, ours = make_vit(1, tile_px=90), make_vit(2)
    weights = {**theirs.state_dict(), "fc_norm.weight": torch.ones(24)}
    save_file(weights, tmp_path / "timm.safetensors")
    missing, unused = start_from(ours, tmp_path / "timm.safetensors")
    assert missing == [] and unused == ["fc_norm.weight"]
    assert torch.equal(ours.pos_embed[:, 0], theirs.pos_embed[:, 0])
    assert ours.pos_embed.shape == (1, 17, 24)


def test_interpolated_positions_keep_their_order():
    side, grid = 14, 10
    rows = torch.arange(side).float().repeat_interleave(side)
    theirs = torch.cat([torch.tensor([[[99.0]]]), rows.view(1, -1, 1)], dim=1)
    ours = fit_positions(theirs, torch.zeros(1, 1 + grid * grid, 1))
    assert ours[0, 0, 0] == 99
    found = ours[0, 1:, 0].view(grid, grid)
    torch.testing.assert_close(found[:, 0], found[:, 5])
    assert (found[:, 0].diff() > 0).all()


def test_kernels_of_another_patch_see_a_plain_colour_as_before():
    theirs = torch.rand(5, 3, 16, 16)
    ours = fit_kernels(theirs, torch.zeros(5, 3, 15, 15))
    assert ours.shape == (5, 3, 15, 15)
    torch.testing.assert_close(ours.sum((2, 3)), theirs.sum((2, 3)), rtol=0.03, atol=0)


def test_layer_scales_are_multiplied_into_the_layer_before_them(tmp_path):
    theirs, ours = make_vit(1), make_vit(2)
    gamma = torch.rand(24)
    save_file({**theirs.state_dict(), "blocks.1.ls2.gamma": gamma}, tmp_path / "dino.safetensors")
    missing, unused = start_from(ours, tmp_path / "dino.safetensors")
    assert missing == unused == []
    x = torch.rand(2, 24)
    torch.testing.assert_close(ours.blocks[1].mlp(x), gamma * theirs.blocks[1].mlp(x))
    torch.testing.assert_close(ours.blocks[0].mlp(x), theirs.blocks[0].mlp(x))


def test_positions_without_a_class_token_start_it_at_zero():
    ours = fit_positions(torch.ones(1, 36, 2), torch.zeros(1, 17, 2))
    assert ours[0, 0].tolist() == [0, 0] and ours.shape == (1, 17, 2)


def test_a_file_of_something_else_is_refused(tmp_path):
    save_file({"layer.weight": torch.ones(2)}, tmp_path / "other.safetensors")
    with pytest.raises(UnreadableCheckpoint, match=r"nothing in .* fits this model"):
        start_from(make_vit(0), tmp_path / "other.safetensors")


def test_a_published_efficientnet_fits_the_stem(tmp_path):
    ours = make_vit(0, stem="efficientnet")
    names = {
        "_conv_stem.weight": "conv.weight",
        "_bn0.running_mean": "norm.running_mean",
        "_blocks.0._depthwise_conv.weight": "blocks.0.depthwise.weight",
        "_blocks.0._bn1.bias": "blocks.0.depthwise_norm.bias",
        "_blocks.10._expand_conv.weight": "blocks.10.expand.weight",
        "_blocks.10._bn0.weight": "blocks.10.expand_norm.weight",
        "_blocks.10._project_conv.weight": "blocks.10.narrow.weight",
        "_blocks.10._bn2.running_var": "blocks.10.narrow_norm.running_var",
    }
    own = ours.state_dict()
    theirs = {name: torch.rand_like(own[f"patch_embed.{mine}"]) for name, mine in names.items()}
    save({**theirs, "_fc.weight": torch.ones(1000, 1280)}, tmp_path / "lite0.pth")
    missing, unused = start_from(ours, tmp_path / "lite0.pth")
    assert unused == ["_fc.weight"] and "patch_embed.proj.weight" in missing
    own = ours.state_dict()
    assert all(torch.equal(own[f"patch_embed.{mine}"], theirs[name]) for name, mine in names.items())


def test_modules_are_told_and_not_all_their_tensors():
    names = ["blocks.0.attn.proj.bias", "blocks.0.norm1.weight", "blocks.11.norm1.weight", "head.bias", "cls_token"]
    assert name_modules(names) == "blocks.0, blocks.11, head, cls_token"
    assert name_modules([]) == "nothing"
