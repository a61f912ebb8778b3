import pytest
import torch
from torch import nn

from model.vit import Attention, Block, ViT, ViTConfig

SMALL = ViTConfig(tile_px=60, width=24, layers=2, heads=3)


def randomised(config: ViTConfig, seed: int = 0) -> ViT:
    """A ViT in which every parameter matters: biases and the head are zero as initialised."""
    torch.manual_seed(seed)
    vit = ViT(config, classes=6).eval()
    for parameter in vit.parameters():
        nn.init.normal_(parameter, std=0.2)
    if config.colour_share:
        vit.colour_head.table.uniform_()
    return vit


@pytest.mark.parametrize("pool", ["class", "mean", "both"])
@pytest.mark.parametrize("stem", ["patch", "conv", "efficientnet"])
def test_shapes_are_those_of_the_paper(stem, pool):
    vit = randomised(ViTConfig(width=32, layers=2, heads=2, stem=stem, pool=pool))
    out = vit(torch.rand(3, 3, 150, 150), need_weights=True)
    assert out.logits.shape == (3, 6)
    assert out.features.shape == (3, 64 if pool == "both" else 32)
    assert [t.shape for t in out.tokens] == [(3, 101, 32)] * 3
    assert [a.shape for a in out.attentions] == [(3, 2, 101, 101)] * 2
    assert torch.allclose(out.attentions[0].sum(-1), torch.ones(3, 2, 101))


def test_weights_are_handed_out_only_when_asked_for():
    assert randomised(SMALL)(torch.rand(1, 3, 60, 60)).attentions == ()


def test_attention_agrees_with_torchs_own_multi_head_attention():
    torch.manual_seed(0)
    ours = Attention(SMALL)
    theirs = nn.MultiheadAttention(SMALL.width, SMALL.heads, batch_first=True)
    theirs.load_state_dict(
        {
            "in_proj_weight": ours.qkv.weight,
            "in_proj_bias": ours.qkv.bias,
            "out_proj.weight": ours.proj.weight,
            "out_proj.bias": ours.proj.bias,
        }
    )
    x = torch.randn(2, 17, SMALL.width)

    mixed, weights = ours(x, None, need_weights=True)
    expected, expected_weights = theirs(x, x, x, average_attn_weights=False)

    torch.testing.assert_close(mixed, expected)
    torch.testing.assert_close(weights, expected_weights)


def test_a_block_agrees_with_torchs_own_encoder_layer():
    block = Block(SMALL, drop_path=0.0).eval()
    theirs = nn.TransformerEncoderLayer(
        SMALL.width, SMALL.heads, 4 * SMALL.width, 0.0, "gelu", 1e-6, batch_first=True, norm_first=True
    )
    names = {
        "attn.qkv.weight": "self_attn.in_proj_weight",
        "attn.qkv.bias": "self_attn.in_proj_bias",
        "attn.proj": "self_attn.out_proj",
        "mlp.fc": "linear",
        "norm": "norm",
    }
    weights = {}
    for name, tensor in block.state_dict().items():
        ours = next(start for start in names if name.startswith(start))
        weights[names[ours] + name.removeprefix(ours)] = tensor
    theirs.load_state_dict(weights)
    x = torch.randn(2, 17, SMALL.width)
    torch.testing.assert_close(block(x, None, need_weights=True)[0], theirs(x))


@pytest.mark.parametrize("removed", [0, 5])
def test_the_explicit_and_the_fused_attention_agree(removed):
    vit = randomised(SMALL)
    images = torch.rand(2, 3, 60, 60)
    keep = torch.arange(16).expand(2, 16) >= removed
    explicit, fused = vit(images, keep=keep, need_weights=True), vit(images, keep=keep)
    torch.testing.assert_close(explicit.logits, fused.logits, atol=2e-6, rtol=2e-6)


@pytest.mark.parametrize("shares", [{}, {"early_share": 0.75}, {"early_share": 0.75, "colour_share": 0.2}])
@pytest.mark.parametrize("pool", ["class", "mean", "both"])
def test_masking_a_patch_is_the_same_as_never_having_it(pool, shares):
    vit = randomised(ViTConfig(tile_px=60, width=24, layers=3, heads=3, pool=pool, **shares))
    images = torch.rand(2, 3, 60, 60)
    visible = torch.tensor([[0, 3, 7], [1, 2, 15]])
    keep = torch.zeros(2, 16, dtype=torch.bool).scatter(1, visible, True)
    torch.testing.assert_close(vit(images, keep=keep).logits, vit(images, visible=visible).logits, atol=1e-5, rtol=1e-5)


def test_an_early_head_reads_the_patches_before_any_layer_and_counts_as_much_as_it_is_told():
    vit = randomised(ViTConfig(tile_px=60, width=24, layers=2, heads=3, early_share=0.75))
    vit.early_norm.running_mean = torch.randn(24)
    images = torch.rand(3, 3, 60, 60)
    out = vit(images)
    early = vit.early_norm(vit.patch_embed((images - 0.5) / 0.5).mean(dim=1))
    torch.testing.assert_close(out.features, torch.cat([vit.norm(out.tokens[-1])[:, 0], early], dim=1))
    torch.testing.assert_close(out.opinions, (vit.head(out.features[:, :24]), vit.early_head(early)))
    torch.testing.assert_close(out.logits, 0.25 * out.opinions[0] + 0.75 * out.opinions[1])


def test_a_colour_head_counts_as_far_as_the_colours_are_known():
    vit = randomised(ViTConfig(tile_px=60, width=24, layers=2, heads=3, early_share=0.75, colour_share=0.2))
    images = torch.rand(3, 3, 60, 60)
    vit.colour_head.table[:, -1] = 0
    silent = vit(images)
    torch.testing.assert_close(silent.logits, 0.25 * silent.opinions[0] + 0.75 * silent.opinions[1])
    vit.colour_head.table[:, -1] = 1
    heard = vit(images)
    votes = vit.colour_head(images)[..., :-1].mean(dim=1) + vit.colour_head.bias
    torch.testing.assert_close(heard.logits, 0.8 * silent.logits + 0.2 * votes)
    torch.testing.assert_close(heard.features, silent.features)
    assert len(heard.opinions) == 2  # it isn't trained


@pytest.mark.parametrize("pool", ["class", "both"])
def test_the_number_of_parameters_follows_the_closed_formula(pool):
    config = ViTConfig(width=192, layers=12, heads=3, pool=pool)
    d, l, k, p, t = config.width, config.layers, 6, config.patch_px, 1 + config.grid**2  # noqa: E741
    embedding = (3 * p * p + 1) * d + d + t * d
    block = 2 * 2 * d + (d + 1) * 3 * d + (d + 1) * d + (d + 1) * 4 * d + (4 * d + 1) * d
    head = 2 * d + (config.feature_width + 1) * k
    assert sum(p.numel() for p in ViT(config, classes=6).parameters()) == embedding + l * block + head


def test_each_token_of_the_conv_stem_looks_at_its_own_patch():
    vit = randomised(ViTConfig(width=32, layers=1, heads=2, stem="conv"))
    images = torch.full((1, 3, 150, 150), 0.5, requires_grad=True)
    token = vit.patch_embed(images)[0, 4 * 10 + 6].sum()  # row 4, column 6
    (gradient,) = torch.autograd.grad(token, images)
    seen = gradient.abs().sum((0, 1))  # (S, S)
    rows, columns = seen.sum(1).nonzero()[:, 0], seen.sum(0).nonzero()[:, 0]
    for pixels, first in ((rows, 4 * 15), (columns, 6 * 15)):
        assert pixels.float().mean().item() == pytest.approx(first + 7, abs=1)
        assert pixels.min() >= first - 15 and pixels.max() < first + 30  # no farther than its neighbours


def test_sizes_that_do_not_divide_are_refused_with_the_divisors():
    with pytest.raises(ValueError, match=r"tile_px 150 is not a multiple of patch_px 16.*15, 25"):
        ViTConfig(patch_px=16)
    with pytest.raises(ValueError, match=r"width 192 is not a multiple of heads 5"):
        ViTConfig(heads=5)
    with pytest.raises(ValueError, match="patch_px must be 15, not 10"):
        ViTConfig(patch_px=10, stem="conv")
