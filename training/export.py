"""From a trained network to the artefact that is served: two graphs, their variants, a golden tile, one manifest.

Nothing is written to the target unless the graphs agree with torch, with each other and with what they were asked for.
"""

import copy
import hashlib
import itertools
import logging
import shutil
import subprocess
import tempfile
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import BinaryIO, Literal

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from onnx import ModelProto, TensorProto, external_data_helper
from PIL import Image
from torch import Tensor, nn

from model.artifact import (
    Architecture,
    File,
    Golden,
    Manifest,
    Maps,
    Precision,
    Variant,
    describe_file,
    write_manifest,
)
from model.graph import ExplainGraph, PredictGraph, Prediction, find_methods, find_removal, name_outputs
from model.network import Network, TokenConfig
from model.runtime import ort
from model.scope import write_reference
from model.session import open_classifier, open_session
from training.config import Card
from training.evaluate import predict_singly
from training.findings import Findings
from training.synthetic import draw_tile

OPSET = 20  # from 23 on attention becomes one fused operator that keeps its weights to itself
PARITY_BATCHES = (1, 2, 5)
LOGIT_TOLERANCE = 1e-4
MAP_TOLERANCE = 5e-5  # float32 itself moves a sharp attention weight by up to 4e-5, measured against float64
EXTERNAL_FROM_BYTES = 1024  # smaller tensors stay in the graph
# What the golden tile's probabilities may differ by: other processors and kernels are allowed for, no more.
GOLDEN_TOLERANCE: dict[Precision, float] = {"fp32": 2e-3, "fp16": 2e-2, "int8": 1e-1}
EVIDENCE: dict[str, Literal["exact", "first-order", "mixed"]] = {
    "mean": "exact",
    "class": "first-order",
    "both": "mixed",
}

Tiles = NDArray[np.uint8]


class ParityFailed(RuntimeError):
    pass


class NotAnArtefact(ValueError):
    pass


def export(
    net: Network, name: str, card: Card, findings: Findings, tile_mpp: float, check_tiles: Tiles, folder: Path
) -> Manifest:
    """Writes the artefact to `folder`, in place of one that may be there, when all checks have passed.

    `check_tiles` are real tiles, labelled or not: parity is gated and the variants' change is measured on them.
    """
    refuse_other_folder(folder)
    net = net.cpu().float().eval()
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".export-") as temporary:
        new = Path(temporary) / folder.name
        new.mkdir()
        files = write_graphs(net, findings.calibration.temperature, new)
        check_parity(net, findings.calibration.temperature, check_tiles, new)
        if card.int8:
            files.append(write_int8(new))
        if card.fp16:
            files += write_fp16(new)
        files += write_golden(net.config.tile_px, new)
        if findings.reference:
            write_reference(findings.reference, new / "reference.npz")
            files.append(describe_file(new / "reference.npz", "reference"))
        if card.licence_file:
            shutil.copyfile(card.licence_file, new / "LICENSE")
            files.append(describe_file(new / "LICENSE", "licence"))

        manifest = describe_artifact(net, name, card, findings, tile_mpp, files, new)
        write_manifest(manifest, new)
        variants = {p: measure_variant(new, p, check_tiles) for p in manifest.precisions() if p != "fp32"}
        manifest = manifest.model_copy(update={"variants": variants})
        write_manifest(manifest, new)
        open_classifier(new, device="cpu")  # as the service will: it refuses what it can't trust
        if folder.exists():
            folder.replace(Path(temporary) / f"{folder.name}.old")  # goes with the temporary directory
        new.replace(folder)
    return manifest


def refuse_other_folder(folder: Path) -> None:
    """What is replaced is deleted, so that it has to be an artefact, or nothing."""
    if not folder.exists() or (folder / "manifest.json").exists():
        return
    if not folder.is_dir() or any(folder.iterdir()):
        raise NotAnArtefact(
            f"{folder} is there and is no artefact, as it has no manifest.json, so it is not replaced: "
            "name a new folder, an empty one, or that of an artefact"
        )


def describe_artifact(
    net: Network, name: str, card: Card, findings: Findings, tile_mpp: float, files: list[File], folder: Path
) -> Manifest:
    config = net.config
    reads = config.pool if isinstance(config, TokenConfig) else "mean"
    return Manifest(
        format=1,
        name=name,
        version=card.version,
        summary=card.summary,
        architecture=Architecture(
            kind=config.architecture,
            sizes={name: size for name, size in asdict(config).items() if name != "architecture"},
            parameters=sum(p.numel() for p in net.parameters()),
        ),
        classes=card.classes,
        tile_px=config.tile_px,
        tile_mpp=tile_mpp,
        grid=config.grid,
        layers=config.layers if isinstance(config, TokenConfig) else 0,
        heads=config.heads if isinstance(config, TokenConfig) else 0,
        feature_width=config.feature_width,
        calibration=findings.calibration,
        conformal=findings.conformal,
        gate=findings.gate,
        maps=Maps(
            evidence=EVIDENCE[reads],
            default="evidence",
            reads=reads,
            methods=find_methods(config),
            removal=find_removal(config),
        ),
        metrics=findings.metrics,
        data=card.data,
        intended_use=card.intended_use,
        limits=card.limits,
        weights_licence=card.weights_licence,
        files=files,
        variants={},
        golden=Golden(probabilities=golden_probabilities(folder, config.tile_px), tolerance=GOLDEN_TOLERANCE),
        versions=versions(),
    )


# -- graphs --------------------------------------------------------------------------------------------------------


def write_graphs(net: Network, temperature: float, folder: Path) -> list[File]:
    tiles = torch.zeros(2, net.config.tile_px, net.config.tile_px, 3, dtype=torch.uint8)
    keep = torch.ones(2, net.config.grid**2, dtype=torch.bool)
    predict = trace(PredictGraph(net, temperature), {"tiles": tiles}, Prediction._fields)
    explain = trace(ExplainGraph(net, temperature), {"tiles": tiles, "keep": keep}, name_outputs(net.config))
    share_weights({"predict.onnx": predict, "explain.onnx": explain}, folder, "weights.bin")
    return [
        describe_file(folder / "predict.onnx", "predict", "fp32"),
        describe_file(folder / "explain.onnx", "explain", "fp32"),
        describe_file(folder / "weights.bin", "weights", "fp32"),
    ]


def trace(graph: nn.Module, inputs: dict[str, Tensor], outputs: Iterable[str]) -> ModelProto:
    batch = torch.export.Dim("batch", min=1, max=1024)
    with quiet():
        program = torch.onnx.export(
            graph.eval(),
            tuple(inputs.values()),
            input_names=list(inputs),
            output_names=list(outputs),
            dynamic_shapes=tuple({0: batch} for _ in inputs),
            opset_version=OPSET,
            dynamo=True,
            verbose=False,
        )
    assert program is not None
    proto = program.model_proto
    onnx.checker.check_model(proto)
    for node in proto.graph.node:  # the exporter notes the lines of code, with this machine's paths
        del node.metadata_props[:]
        node.doc_string = ""
    del proto.graph.metadata_props[:], proto.metadata_props[:]
    return proto


@contextmanager
def quiet() -> Iterator[None]:
    """The exporter and the quantiser warn about their own insides, which nobody here can mend."""
    logging.disable(logging.WARNING)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
    logging.disable(logging.NOTSET)


def share_weights(graphs: dict[str, ModelProto], folder: Path, name: str) -> None:
    """One file of weights for all graphs: a tensor that both have is stored once."""
    offsets: dict[bytes, int] = {}
    with (folder / name).open("wb") as file:
        for proto in graphs.values():
            for tensor in proto.graph.initializer:
                move_out(tensor, file, offsets, name)
    for graph_name, proto in graphs.items():
        (folder / graph_name).write_bytes(proto.SerializeToString(deterministic=True))


def move_out(tensor: TensorProto, file: BinaryIO, offsets: dict[bytes, int], name: str) -> None:
    raw = tensor.raw_data
    if len(raw) < EXTERNAL_FROM_BYTES:
        return
    key = hashlib.sha256(raw).digest()
    if key not in offsets:
        offsets[key] = file.tell()
        file.write(raw)
    external_data_helper.set_external_data(tensor, name, offset=offsets[key], length=len(raw))
    tensor.ClearField("raw_data")


def write_int8(folder: Path) -> File:
    """Dynamic, per channel, products of matrices only: 1.5 to 2.3 times as fast where the processor has VNNI."""
    from onnxruntime.quantization import QuantType, quantize_dynamic  # after model.runtime, which silences it

    target = folder / "predict.int8.onnx"
    with tempfile.TemporaryDirectory() as temporary:
        plain = Path(temporary) / "plain.onnx"
        proto = onnx.load(folder / "predict.onnx")
        del proto.graph.value_info[:]  # shapes that the quantiser's own inference contradicts
        onnx.save(proto, plain)
        with quiet():
            quantize_dynamic(plain, target, ["MatMul"], per_channel=True, weight_type=QuantType.QInt8)
    return describe_file(target, "predict", "int8")


def write_fp16(folder: Path) -> list[File]:
    from onnxruntime.transformers.float16 import convert_float_to_float16  # imports much, wanted rarely

    graphs = {}
    for role in ("predict", "explain"):
        proto = onnx.load(folder / f"{role}.onnx")
        graphs[f"{role}.fp16.onnx"] = convert_float_to_float16(proto, keep_io_types=True)
    share_weights(graphs, folder, "weights.fp16.bin")
    return [
        describe_file(folder / "predict.fp16.onnx", "predict", "fp16"),
        describe_file(folder / "explain.fp16.onnx", "explain", "fp16"),
        describe_file(folder / "weights.fp16.bin", "weights", "fp16"),
    ]


# -- checks --------------------------------------------------------------------------------------------------------


@torch.no_grad()
def check_parity(net: Network, temperature: float, tiles: Tiles, folder: Path) -> None:
    """The same tiles through torch, predict.onnx and explain.onnx: same labels, logits and maps within tolerance.

    Torch computes in float64 here, so that only the graphs' own rounding counts.
    """
    reference = ExplainGraph(copy.deepcopy(net).double(), temperature)
    sessions = {role: open_session(folder / f"{role}.onnx", threads=0) for role in ("predict", "explain")}
    start = 0
    for size in itertools.cycle(PARITY_BATCHES):
        if start >= len(tiles):
            return
        compare_outputs(reference, tiles[start : start + size], sessions)
        start += size


def compare_outputs(reference: ExplainGraph, tiles: Tiles, sessions: dict[str, ort.InferenceSession]) -> None:
    keep = np.ones((len(tiles), reference.net.config.grid**2), bool)
    expected = reference(torch.from_numpy(tiles), torch.from_numpy(keep))
    predicted = dict(zip(Prediction._fields, sessions["predict"].run(None, {"tiles": tiles}), strict=True))
    explained = dict(
        zip(
            name_outputs(reference.net.config),
            sessions["explain"].run(None, {"tiles": tiles, "keep": keep}),
            strict=True,
        )
    )
    for graph, answer in (("predict", predicted), ("explain", explained)):
        for name, given in answer.items():
            wanted = getattr(expected, name).numpy()
            difference = float(np.abs(given - wanted).max())
            tolerance = (
                MAP_TOLERANCE if name in ("attention", "rollout", "evidence", "probabilities") else LOGIT_TOLERANCE
            )
            if not difference <= tolerance:
                raise ParityFailed(
                    f"{graph}.onnx differs from torch in {name} by {difference:.1e} (allowed {tolerance:.0e}) "
                    f"on a batch of {len(tiles)}; nothing was written"
                )
        if (answer["logits"].argmax(1) != expected.logits.numpy().argmax(1)).any():
            raise ParityFailed(f"{graph}.onnx names other classes than torch; nothing was written")


def measure_variant(folder: Path, precision: Precision, tiles: Tiles) -> Variant:
    exact, variant = predict_singly(folder, tiles, "fp32"), predict_singly(folder, tiles, precision)
    return Variant(
        same_label=float((exact.argmax(1) == variant.argmax(1)).mean()),
        mean_probability_change=float(np.abs(exact - variant).mean()),
        n=len(tiles),
    )


# -- what lies beside the graphs -----------------------------------------------------------------------------------


def write_golden(tile_px: int, folder: Path) -> list[File]:
    Image.fromarray(draw_tile(0, seed=0, tile_px=tile_px)).save(folder / "golden.png")
    return [describe_file(folder / "golden.png", "golden")]


def golden_probabilities(folder: Path, tile_px: int) -> list[float]:
    tile = draw_tile(0, seed=0, tile_px=tile_px)[None]
    session = open_session(folder / "predict.onnx", threads=0)
    return [float(p) for p in session.run(["probabilities"], {"tiles": tile})[0][0]]


def versions() -> dict[str, str]:
    """`-dirty` follows the commit where something that git knows was changed since."""
    describe = ["git", "describe", "--always", "--abbrev=40", "--exclude=*", "--dirty"]
    code = Path(__file__).parent  # and not the user's folder, which may lie in another repository
    commit = subprocess.run(describe, cwd=code, capture_output=True, text=True, check=False).stdout.strip()
    packages = ("torch", "onnx", "onnxruntime", "pillow")
    return {name: ort.__version__ if name == "onnxruntime" else version(name) for name in packages} | {
        "commit": commit or "unknown"
    }
