import math

import pytest
import torch
from torch import nn

from model.layers import DropPath, Mlp, Residual, Scaling, attention_weights, patch_shares, pool


@pytest.mark.parametrize(("mean", "std"), [((0.5,) * 3, (0.5,) * 3), ((0.4, 0.5, 0.6), (0.2, 0.3, 0.25))])
def test_each_channel_is_scaled_by_its_own_numbers(mean, std):
    images = torch.rand(2, 3, 4, 4)
    scaled = Scaling(mean, std)(images)
    for channel in range(3):
        torch.testing.assert_close(scaled[:, channel], (images[:, channel] - mean[channel]) / std[channel])
    assert not Scaling(mean, std).state_dict()  # they are the config's, not the checkpoint's


def test_the_mlp_is_four_times_as_wide_and_uses_gelu():
    mlp = Mlp(24, 4)
    x = torch.randn(5, 24)
    assert mlp.fc1.out_features == 4 * 24
    torch.testing.assert_close(mlp(x), mlp.fc2(nn.GELU()(mlp.fc1(x))))


def test_drop_path_skips_some_branches_and_keeps_the_mean():
    drop_path = DropPath(0.5).train()
    branch = torch.ones(4000, 1, 1)
    dropped = drop_path(branch)
    assert set(dropped.unique().tolist()) == {0.0, 2.0}
    assert dropped.mean().item() == pytest.approx(1, abs=0.1)
    assert drop_path.eval()(branch) is branch


def test_a_bare_way_around_has_nothing_to_learn():
    bare, projected = Residual(8, 8, 1, bare=True).eval(), Residual(8, 8, 1).eval()
    names = {name for name in projected.state_dict() if name.startswith("shortcut.")}
    assert names and projected.state_dict().keys() - bare.state_dict().keys() == names
    nn.init.zeros_(bare.norm2.weight)  # the two convolutions say nothing
    x = torch.rand(1, 8, 5, 5)
    torch.testing.assert_close(bare(x), x)


def test_the_head_reads_the_tokens_it_is_told_to_and_none_that_was_removed():
    tokens, keep = torch.randn(2, 5, 3), torch.tensor([[True, False, True, True], [False, False, False, True]])
    mean = torch.stack([tokens[0, [1, 3, 4]].mean(dim=0), tokens[1, 4]])
    torch.testing.assert_close(pool(tokens, keep, "class"), tokens[:, 0])
    torch.testing.assert_close(pool(tokens, keep, "mean"), mean)
    torch.testing.assert_close(pool(tokens, keep, "both"), torch.cat([tokens[:, 0], mean], dim=1))
    torch.testing.assert_close(pool(tokens, None, "mean"), tokens[:, 1:].mean(dim=1))
    assert (patch_shares(torch.zeros(1, 4, dtype=torch.bool)) == 0).all()  # where none is left, none counts


def test_attention_scores_are_scaled_by_the_root_of_the_head_width():
    q, k = torch.ones(1, 1, 2, 16), torch.tensor([[[[0.0] * 16, [1.0] * 16]]])
    odds = math.exp(16 / math.sqrt(16))
    assert attention_weights(q, k, None)[0, 0, 0, 1].item() == pytest.approx(odds / (1 + odds))
