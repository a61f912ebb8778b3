"""Which network: all there are, told apart by the type of their config."""

from typing import assert_never

from model.convnets import ConvMixer, ConvMixerConfig, PoolFormer, PoolFormerConfig, ResNet, ResNetConfig
from model.msht import MSHT, MSHTConfig
from model.vit import ViT, ViTConfig

TokenConfig = ViTConfig | MSHTConfig  # networks with a token for each patch: dense labels, attention, patches dropped
NetworkConfig = TokenConfig | PoolFormerConfig | ConvMixerConfig | ResNetConfig
TokenNetwork = ViT | MSHT
Network = TokenNetwork | PoolFormer | ConvMixer | ResNet


def build_tokens(config: TokenConfig, classes: int) -> TokenNetwork:
    return ViT(config, classes) if isinstance(config, ViTConfig) else MSHT(config, classes)


def build(config: NetworkConfig, classes: int) -> Network:
    match config:
        case ViTConfig() | MSHTConfig():
            return build_tokens(config, classes)
        case PoolFormerConfig():
            return PoolFormer(config, classes)
        case ConvMixerConfig():
            return ConvMixer(config, classes)
        case ResNetConfig():
            return ResNet(config, classes)
        case _:
            assert_never(config)
