import pytest

from model.convnets import ConvMixer, ConvMixerConfig, PoolFormer, PoolFormerConfig, ResNet, ResNetConfig
from model.msht import MSHT, MSHTConfig
from model.network import NetworkConfig, build
from model.vit import ViT, ViTConfig

KINDS: list[tuple[NetworkConfig, type]] = [
    (ViTConfig(), ViT),
    (MSHTConfig(), MSHT),
    (PoolFormerConfig(), PoolFormer),
    (ConvMixerConfig(), ConvMixer),
    (ResNetConfig(), ResNet),
]


@pytest.mark.parametrize(("config", "kind"), KINDS, ids=[config.architecture for config, _ in KINDS])
def test_a_config_builds_its_network_and_all_are_of_one_size(config, kind):
    net = build(config, classes=6)
    assert type(net) is kind and net.config == config and config.grid == 10
    assert 2e6 < sum(p.numel() for p in net.parameters()) < 3.5e6
    assert net.get_parameter("head.weight" if hasattr(net, "head") else "ending.head.weight").shape[0] == 6
