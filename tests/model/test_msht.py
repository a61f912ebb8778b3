import pytest
import torch
from torch import nn

from model.msht import MSHT, Encoder, Focus, MSHTConfig, emphasise

SMALL = MSHTConfig(tile_px=60, channels=(8, 8, 16, 16), width=24, heads=3, drop_path=0.5)


def randomised(config: MSHTConfig) -> MSHT:
    torch.manual_seed(0)
    net = MSHT(config, classes=5).eval()
    for parameter in net.parameters():
        nn.init.normal_(parameter, std=0.1)
    return net


@pytest.mark.parametrize("pool", ["class", "mean", "both"])
def test_every_intermediate_has_its_shape(pool):
    config = MSHTConfig(tile_px=60, channels=(8, 8, 16, 16), width=24, heads=3, pool=pool)
    out = randomised(config)(torch.rand(2, 3, 60, 60), need_weights=True)
    assert out.logits.shape == (2, 5) and out.features.shape == (2, config.feature_width)
    assert [x.shape for x in out.tokens] == [(2, 17, 24)] * 5
    assert [x.shape for x in (*out.attentions, *out.self_attentions)] == [(2, 3, 17, 17)] * 8
    torch.testing.assert_close(out.attentions[0].sum(-1), torch.ones(2, 3, 17))


def test_explicit_and_fused_attention_agree_with_patches_removed():
    net, images = randomised(SMALL), torch.rand(2, 3, 60, 60)
    keep = torch.rand(2, 16) < 0.6
    explicit, fused = net(images, keep=keep, need_weights=True), net(images, keep=keep)
    torch.testing.assert_close(explicit.logits, fused.logits)
    assert fused.attentions == ()


def test_removing_a_token_is_the_same_as_not_having_it():
    net, images = randomised(MSHTConfig(tile_px=60, channels=(8, 8, 16, 16), width=24, heads=3, pool="both")), None
    images = torch.rand(1, 3, 60, 60)
    keep = torch.ones(1, 16, dtype=torch.bool)
    keep[0, [2, 7]] = False
    visible = keep[0].nonzero()[:, 0].unsqueeze(0)
    torch.testing.assert_close(net(images, keep=keep).logits, net(images, visible=visible).logits)


def test_queries_and_keys_of_the_guided_attention_come_from_the_stages_alone():
    net, images = randomised(SMALL), torch.rand(1, 3, 60, 60)
    before = net(images, need_weights=True)
    nn.init.normal_(net.embed.weight)  # other tokens
    after = net(images, need_weights=True)
    for one, other in zip(before.attentions, after.attentions, strict=True):
        torch.testing.assert_close(one, other)
    assert not torch.allclose(before.self_attentions[0], after.self_attentions[0])
    nn.init.normal_(net.get_parameter("encoder.stages.1.conv1.weight"))
    changed = net(images, need_weights=True)
    torch.testing.assert_close(changed.attentions[0], after.attentions[0])  # stage 1 comes before
    assert not torch.allclose(changed.attentions[1], after.attentions[1])


def test_cells_are_centred_on_their_patches():
    """With mirrored kernels a mirrored image gives the mirrored cells: any shift of the grid would show."""
    encoder = Encoder(SMALL).eval()
    for module in encoder.modules():
        if isinstance(module, nn.Conv2d):
            module.weight.data = module.weight.data + module.weight.data.flip(-1)
    images = torch.rand(1, 3, 60, 60)
    for straight, mirrored in zip(encoder(images), encoder(images.flip(-1)), strict=True):
        torch.testing.assert_close(straight.flip(-1), mirrored, atol=1e-5, rtol=1e-4)
    assert [stage.shape[-1] for stage in encoder(images)] == [20, 20, 4, 4]


def test_the_parameter_free_attention_lifts_what_stands_out():
    x = torch.ones(1, 1, 5, 5)
    x[0, 0, 2, 3] = 4.0
    share = (emphasise(x) / x)[0, 0]
    assert share.argmax() == 2 * 5 + 3 and share[2, 3] > 0.9
    assert (share[0] < 0.65).all()
    deviation = (x - x.mean()).square()  # the paper's closed form
    expected = torch.sigmoid(deviation / (4 * (deviation.sum() / 24 + 1e-4)) + 0.5)
    torch.testing.assert_close(share, expected[0, 0])


def test_gaze_takes_the_strongest_and_glance_the_mean():
    focus = Focus(channels=1, pooling=2, width=2)
    with torch.no_grad():
        for conv in (focus.gaze, focus.glance):
            conv.weight.copy_(torch.tensor([1.0, -1.0]).view(2, 1, 1, 1))
            focus.get_parameter("gaze.bias" if conv is focus.gaze else "glance.bias").zero_()
        focus.gaze_norm = focus.glance_norm = nn.Identity()  # type: ignore[assignment]
        stage = torch.rand(1, 1, 4, 4)
        gaze, glance = focus(stage)
        x = emphasise(stage)
    assert gaze[0, 0, 0] == x[0, 0, :2, :2].max()
    torch.testing.assert_close(glance[0, 3, 0], x[0, 0, 2:, 2:].mean())


def test_deeper_blocks_are_skipped_more_often_and_only_in_training():
    net = randomised(SMALL)
    rates = [block.get_submodule("drop_path").rate for block in net.blocks]
    assert rates == pytest.approx([0, 1 / 6, 1 / 3, 1 / 2])
    images = torch.rand(2, 3, 60, 60)
    assert torch.equal(net(images).logits, net(images).logits)
    net.train()
    assert not torch.equal(net(images).logits, net(images).logits)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"tile_px": 100}, "multiple of 15"),
        ({"heads": 3}, "width 128 is not a multiple of heads 3"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(sizes, message):
    with pytest.raises(ValueError, match=message):
        MSHTConfig(**sizes)
