"""The colour tables of the overlays: for each name 256 colours, uint8 (256, 3), from low to high.

Each table is written as every fifth of its 256 colours and interpolated in between, which is off by at most
one level of 255 from the original (cividis, whose original has a kink, by four).
"""

import numpy as np

from app.schemas import Colormap

_ANCHORS: dict[Colormap, str] = {
    # Van der Walt and Smith's viridis and magma, CC0, and cividis of Nunez, Anderton and Renslow
    # (PLOS ONE 2018, made for readers with a colour deficiency), as matplotlib 3.11 has them.
    "viridis": (
        "440154 46085c 471063 481769 481d6f 482475 472a7a 46307e 453781 433d84 414287 3f4889 3d4e8a "
        "3a538b 38598c 355e8d 33638d 31688e 2e6d8e 2c718e 2a768e 297b8e 27808e 25848e 23898e 218e8d "
        "20928c 1f978b 1e9c89 1fa188 21a585 24aa83 28ae80 2eb37c 35b779 3dbc74 46c06f 50c46a 5ac864 "
        "65cb5e 70cf57 7cd250 89d548 95d840 a2da37 b0dd2f bddf26 cae11f d8e219 e5e419 f1e51d fde725"
    ),
    "cividis": (
        "00224e 002656 002a5f 002d68 003070 083370 163770 203a6f 273e6e 2e416d 34456c 3a486c 3f4c6c "
        "444f6c 49536c 4e566c 535a6d 575d6d 5c616e 60646f 656870 696b71 6d6f72 727274 767676 7a7a78 "
        "7e7d78 838179 888578 8d8878 928c78 969077 9b9476 a09875 a59c74 aaa073 afa471 b5a86f baac6d "
        "bfb06b c4b468 c9b965 cfbd62 d4c15f dac65b dfca57 e5cf52 ead34c f0d846 f6dd3f fce236 fee838"
    ),
    "magma": (
        "000004 02020b 050416 090720 0e0b2b 140e36 1a1042 21114e 29115a 311165 390f6e 420f75 4a1079 "
        "52137c 5a167e 621980 6a1c81 721f81 792282 812581 892881 912b81 992d80 a1307e aa337d b2357b "
        "ba3878 c23b75 ca3e72 d2426f d9466b e04c67 e75263 ec5860 f1605d f4695c f7725c f97b5d fb8560 "
        "fc8e64 fd9869 fea16e feaa74 feb47b febd82 fec68a fecf92 fed89a fde2a3 fdebac fcf4b6 fcfdbf"
    ),
    # Ours, for signed maps: straight lines in OKLab from near-white (lightness 0.97) at zero to a blue (hue
    # 260 degrees) and an orange (36 degrees) of one lightness, 0.58, and one chroma, 0.20, so that
    # neither sign looks stronger; blue and orange stay apart for the red-green blind.
    "diverging": (
        "2873ed 3279ee 3b7eef 4384f0 4c89f0 548ff1 5c94f2 649af3 6c9ff3 73a4f4 7ba9f4 83aef5 8bb3f5 "
        "93b8f6 9abdf6 a2c2f6 aac7f6 b2ccf6 bad1f6 c1d6f6 c9dbf6 d1dff6 d9e4f6 e1e9f6 e9eef6 f1f3f5 "
        "f5f2f1 f5ebe8 f5e4e0 f5ded7 f5d7cf f4d0c6 f4c9be f3c3b5 f2bcad f1b5a5 f0ae9c efa894 eea18c "
        "ed9a83 eb937b ea8c72 e8856a e67e61 e57659 e36f50 e16746 df5f3d dd5732 da4e27 d84518 d63b00"
    ),
}


def interpolate(anchors: str) -> np.ndarray:
    known = np.frombuffer(bytes.fromhex(anchors), np.uint8).reshape(52, 3)
    levels = np.arange(256)
    channels = [np.interp(levels, levels[::5], channel) for channel in known.T]
    return np.stack(channels, axis=1).round().astype(np.uint8)


TABLES: dict[Colormap, np.ndarray] = {name: interpolate(anchors) for name, anchors in _ANCHORS.items()}
