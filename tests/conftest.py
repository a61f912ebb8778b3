"""The artefact of the tests: a tiny ViT as its random numbers made it, exported as a real one is."""

import warnings
from hashlib import sha256
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytest

from training.synthetic import SHIPPED_KINDS, draw_tile

ROOT = Path(__file__).parents[1]
MADE_FROM = ("tests/conftest.py", "model/*.py", "training/export.py", "training/synthetic.py", "training/config.py")


@pytest.fixture(scope="session")
def anyio_backend() -> str:
    """What runs the tests that are coroutines, each in a loop of its own."""
    return "asyncio"


@pytest.fixture(scope="session")
def tiny_artifact(pytestconfig) -> Path:
    """fp32 and int8 graphs with two layers of two heads; its answers mean nothing, but differ from tile to tile.

    The export takes many seconds, so pytest's cache keeps it until something changes that it is made from.
    """
    return keep(pytestconfig, "tiny")


@pytest.fixture(scope="session")
def tokenless_artifact(pytestconfig) -> Path:
    """The like of a network without tokens, which has no attention."""
    return keep(pytestconfig, "tokenless")


def keep(pytestconfig: pytest.Config, name: str) -> Path:
    folder = Path(pytestconfig.cache.mkdir(f"artifact-{fingerprint()}")) / name
    if not folder.exists():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of torch and its exporter, about themselves
            export_tiny(folder)
    return folder


def fingerprint() -> str:
    files = sorted(file for pattern in MADE_FROM for file in ROOT.glob(pattern))
    versions = [version(package) for package in ("torch", "onnx", "onnxscript", "numpy", "pillow")]
    return sha256(repr([versions, *(file.read_bytes() for file in files)]).encode()).hexdigest()[:16]


def export_tiny(folder: Path) -> None:
    import torch

    from model.artifact import Calibration, Gate, TissueClass
    from model.convnets import ResNetConfig
    from model.network import build
    from model.quality import PALETTE_SIZE
    from model.scope import Cloud, Reference
    from model.vit import ViTConfig
    from training.config import Card
    from training.export import export
    from training.findings import Findings

    torch.manual_seed(0)
    small = ViTConfig(width=32, layers=2, heads=2), ResNetConfig(widths=(8, 8, 16, 16), blocks=(1, 1, 1, 1))
    net = build(small[0] if folder.name == "tiny" else small[1], classes=len(SHIPPED_KINDS))
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            if name.endswith("head.weight"):
                parameter.normal_()  # it starts at zero, where every tile has the same answer
    card = Card(
        version="0.0.1",
        summary="Random weights, for tests",
        classes=[
            TissueClass(name=name, description=name, color=f"#{n:02x}4080") for n, name in enumerate(SHIPPED_KINDS)
        ],
    )
    width = net.config.feature_width
    findings = Findings(
        calibration=Calibration(temperature=1.5, n=0, protocol="none"),
        conformal=None,
        gate=Gate(min_tissue_share=0.2, min_sharpness=20, min_confidence=0.1, max_distance=1000, protocol="none"),
        metrics=[],
        reference=Reference(
            np.ones(PALETTE_SIZE, bool), Cloud(np.zeros(width, np.float32), np.eye(width, dtype=np.float32))
        ),
    )
    tiles = np.stack([draw_tile(kind, seed) for kind in SHIPPED_KINDS for seed in range(2)])
    export(net, folder.name, card, findings, 0.495, tiles, folder)
