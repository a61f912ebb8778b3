import pytest
import torch
from torch import Tensor, nn

from model import msht
from model.convnets import ConvMixer, ConvMixerConfig
from model.graph import (
    ExplainGraph,
    PredictGraph,
    cell_evidence,
    evidence,
    fill_removed,
    find_methods,
    name_outputs,
    rollout,
    to_images,
)
from model.msht import MSHT, MSHTConfig
from model.vit import Block, ViT, ViTConfig

K, G = 4, 4


def make_vit(pool: str, **more: float) -> ViT:
    torch.manual_seed(1)
    config = ViTConfig(tile_px=60, width=24, layers=3, heads=3, pool=pool, **more)  # type: ignore[arg-type]
    vit = ViT(config, K).double().eval()
    for parameter in vit.parameters():
        nn.init.normal_(parameter, std=0.3)
    return vit


def make_images() -> Tensor:
    return torch.rand(2, 3, 60, 60, dtype=torch.float64)


ALL = torch.ones(2, G * G, dtype=torch.bool)


@pytest.mark.parametrize("removed", [0, 5])
def test_evidence_of_a_mean_head_adds_up_to_the_logit(removed):
    vit = make_vit("mean")
    keep = ALL.clone()
    keep[:, :removed] = False
    out = vit(make_images(), keep=keep, need_weights=True)
    shares = evidence(vit, out, keep)
    torch.testing.assert_close(shares.sum(-1) + vit.head.bias, out.logits)
    assert (shares[:, :, :removed] == 0).all()


def test_evidence_of_a_class_head_is_the_gradient_times_the_message():
    """Against autograd: scale what each patch tells the class token in the last block, and differentiate."""
    vit = make_vit("class")
    out = vit(make_images(), need_weights=True)
    last, before = vit.blocks[-1], out.tokens[-2].detach()
    assert isinstance(last, Block)
    scale = torch.ones(2, G * G, dtype=torch.float64, requires_grad=True)

    _, _, v = last.attn.project(last.norm1(before))
    weights = out.attentions[-1].detach()
    weights = torch.cat([weights[..., :1], weights[..., 1:] * scale[:, None, None, :]], dim=-1)
    mixed = (weights @ v).transpose(1, 2).flatten(2)
    x = before + last.attn.proj(mixed)
    logits = vit.head(vit.norm(x + last.mlp(last.norm2(x)))[:, 0])  # (N, K)
    expected = torch.stack([torch.autograd.grad(logits[:, c].sum(), scale, retain_graph=True)[0] for c in range(K)], 1)

    torch.testing.assert_close(evidence(vit, out, ALL), expected, atol=1e-6, rtol=1e-6)


def test_evidence_of_a_head_that_reads_both_is_the_sum_of_both():
    both = make_vit("both")
    out = both(make_images(), need_weights=True)
    halves = both.head.weight.detach().split(24, dim=1)
    parts = []
    for pool, weight in zip(("class", "mean"), halves, strict=True):
        one = make_vit(pool)
        one.load_state_dict({**both.state_dict(), "head.weight": weight})
        parts.append(evidence(one, out, ALL))
    torch.testing.assert_close(evidence(both, out, ALL), parts[0] + parts[1])


@pytest.mark.parametrize("removed", [0, 5])
def test_evidence_of_an_early_head_adds_up_too(removed):
    vit = make_vit("mean", early_share=0.75)
    vit.early_norm.running_mean = torch.randn(24, dtype=torch.float64)
    vit.early_norm.running_var = torch.full((24,), 3, dtype=torch.float64)
    keep = ALL.clone()
    keep[:, :removed] = False
    out = vit(make_images(), keep=keep, need_weights=True)
    shares = evidence(vit, out, keep)
    torch.testing.assert_close(shares.sum(-1) + 0.25 * vit.head.bias + 0.75 * vit.early_head.bias, out.logits)
    assert (shares[:, :, :removed] == 0).all()


@pytest.mark.parametrize("removed", [0, 5])
def test_evidence_of_a_colour_head_adds_up_with_its_share_in_the_tile(removed):
    vit = make_vit("mean", colour_share=0.5)
    vit.colour_head.table = torch.rand_like(vit.colour_head.table)
    vit.colour_head.bias = torch.randn(K, dtype=torch.float64)
    keep = ALL.clone()
    keep[:, :removed] = False
    out = vit(make_images(), keep=keep, need_weights=True)
    share = out.colours.share  # (N, 1)
    assert ((share > 0) & (share < 0.5)).all()
    shares = evidence(vit, out, keep)
    biases = (1 - share) * vit.head.bias + share * vit.colour_head.bias
    torch.testing.assert_close(shares.sum(-1) + biases, out.logits)
    assert (shares[:, :, :removed] == 0).all()


@pytest.mark.parametrize("pool", ["class", "mean"])
def test_rollout_of_one_row_is_that_row_of_the_full_product(pool):
    vit = make_vit(pool)
    out = vit(make_images(), need_weights=True)
    product = torch.eye(1 + G * G, dtype=torch.float64).expand(2, -1, -1)
    for weights in out.attentions:
        product = (0.5 * weights.mean(1) + 0.5 * torch.eye(1 + G * G)) @ product
    expected = product[:, 0, 1:] if pool == "class" else product[:, 1:, 1:].mean(1)
    torch.testing.assert_close(rollout(vit, out, ALL), expected)


def test_both_graphs_answer_alike_and_probabilities_are_tempered():
    vit = make_vit("both").float()
    tiles = torch.randint(0, 256, (2, 60, 60, 3), dtype=torch.uint8)
    predicted, explained = PredictGraph(vit, 2.0)(tiles), ExplainGraph(vit, 2.0)(tiles, ALL)
    torch.testing.assert_close(predicted.logits, explained.logits)
    torch.testing.assert_close(predicted.probabilities, (predicted.logits / 2).softmax(1))
    assert explained.attention.shape == (2, 3, 3, G, G)
    assert explained.rollout.shape == (2, G, G)
    assert explained.evidence.shape == (2, K, G, G)


def test_attention_rows_are_laid_out_as_the_image_is():
    """A patch that is removed loses its attention at its own place of the grid."""
    vit = make_vit("class").float()
    tiles = torch.randint(0, 256, (1, 60, 60, 3), dtype=torch.uint8)
    keep = torch.ones(1, G * G, dtype=torch.bool)
    keep[0, 1 * G + 2] = False
    attention = ExplainGraph(vit, 1.0)(tiles, keep).attention
    assert (attention[..., 1, 2] == 0).all()
    assert (attention > 0).sum() == attention.numel() - attention[..., 1, 2].numel()


def test_images_are_tiles_in_zero_to_one():
    tile = torch.zeros(1, 2, 2, 3, dtype=torch.uint8)
    tile[0, 1, 0] = torch.tensor([255, 51, 0])
    assert to_images(tile)[0, :, 1, 0].tolist() == pytest.approx([1.0, 0.2, 0.0])


# -- networks of other kinds ---------------------------------------------------------------------------------------


def make_msht(pool: str) -> MSHT:
    torch.manual_seed(2)
    config = MSHTConfig(tile_px=60, channels=(8, 8, 8, 16), width=24, heads=3, pool=pool)  # type: ignore[arg-type]
    net = MSHT(config, K).double().eval()
    for parameter in net.parameters():
        nn.init.normal_(parameter, std=0.3)
    return net


def test_evidence_of_msht_is_the_gradient_times_what_the_guided_attention_told():
    net = make_msht("class")
    out = net(make_images(), need_weights=True)
    last, before = net.blocks[-1], out.before_guidance.detach()
    assert isinstance(last, msht.Block)
    scale = torch.ones(2, G * G, dtype=torch.float64, requires_grad=True)
    weights = out.attentions[-1].detach()
    weights = torch.cat([weights[..., :1], weights[..., 1:] * scale[:, None, None, :]], dim=-1)
    mixed = (weights @ last.guided.values(last.norm3(before))).transpose(1, 2).flatten(2)
    x = before + last.guided.proj(mixed)
    logits = net.head(net.norm(x + last.mlp2(last.norm4(x)))[:, 0])  # (N, K)
    torch.testing.assert_close(logits, out.logits)
    expected = torch.stack([torch.autograd.grad(logits[:, c].sum(), scale, retain_graph=True)[0] for c in range(K)], 1)
    torch.testing.assert_close(evidence(net, out, ALL), expected, atol=1e-6, rtol=1e-6)


def test_evidence_of_msht_with_a_mean_head_adds_up_to_the_logit():
    net = make_msht("mean")
    out = net(make_images(), keep=ALL, need_weights=True)
    torch.testing.assert_close(evidence(net, out, ALL).sum(-1) + net.head.bias, out.logits)


def test_rollout_of_msht_goes_through_both_attentions_of_each_block():
    net = make_msht("class")
    out = net(make_images(), need_weights=True)
    product = identity = torch.eye(1 + G * G, dtype=torch.float64).expand(2, -1, -1)
    for own, guided in zip(out.self_attentions, out.attentions, strict=True):
        for weights in (own, guided):
            product = (0.5 * weights.mean(1) + 0.5 * identity) @ product
    torch.testing.assert_close(rollout(net, out, ALL), product[:, 0, 1:])


def test_four_guided_maps_are_the_attention_of_msht():
    net = make_msht("class").float()
    tiles = torch.randint(0, 256, (2, 60, 60, 3), dtype=torch.uint8)
    keep = torch.ones(2, G * G, dtype=torch.bool)
    keep[:, 6] = False
    explained = ExplainGraph(net, 1.0)(tiles, keep)
    assert explained.attention.shape == (2, 4, 3, G, G)
    assert (explained.attention[..., 1, 2] == 0).all() and (explained.rollout[:, 1, 2] == 0).all()
    out = net(fill_removed(to_images(tiles), keep), keep=keep, need_weights=True)
    torch.testing.assert_close(explained.attention[:, 2, 1].flatten(1), out.attentions[2][:, 1, 0, 1:])


def make_convmixer() -> ConvMixer:
    torch.manual_seed(3)
    net = ConvMixer(ConvMixerConfig(tile_px=60, width=16, blocks=2, kernel=3), K).double().eval()
    for parameter in net.parameters():
        nn.init.normal_(parameter, std=0.3)
    return net


def test_evidence_of_a_network_without_tokens_is_exact():
    net = make_convmixer()
    out = net(make_images())
    torch.testing.assert_close(cell_evidence(net, out).sum(-1) + net.ending.head.bias, out.logits)


def test_a_network_without_tokens_has_no_attention_to_show():
    net = make_convmixer().float()
    assert find_methods(net.config) == ["evidence", "occlusion"]
    tiles = torch.randint(0, 256, (2, 60, 60, 3), dtype=torch.uint8)
    explained = ExplainGraph(net, 2.0)(tiles, ALL)
    assert explained._fields == name_outputs(net.config) == ("logits", "probabilities", "features", "evidence")
    torch.testing.assert_close(explained.logits, PredictGraph(net, 2.0)(tiles).logits)


def test_removed_patches_take_the_mean_colour_of_the_others():
    images = torch.zeros(3, 3, 60, 60)
    images[:, 0, :, :30] = 0.8  # the left half is red
    keep = torch.ones(3, G * G, dtype=torch.bool)
    keep[1, 0] = False  # the upper left patch, which is red
    keep[2] = False
    filled = fill_removed(images, keep)
    torch.testing.assert_close(filled[0], images[0])
    torch.testing.assert_close(
        filled[1, :, :15, :15], torch.tensor([0.8 * 7 / 15, 0, 0]).view(3, 1, 1).expand(3, 15, 15)
    )
    torch.testing.assert_close(filled[1, :, 15:], images[1, :, 15:])
    assert (filled[2] == 0.5).all()
