"""`python -m benchmarks.gpu`: one call that measures an NVIDIA GPU and prints tables.

First the engine alone: images/s by batch, for fp32 as it is served, fp32 with TF32, and fp16, plain or fused attention,
and three ways to call it (plain run; buffers kept on the GPU; a captured CUDA graph), with the share of the measured
bf16 matmul speed of the card. Then the service end to end with 1, 4, 8 and 16 workers. What cannot be measured here is
said, not guessed.
"""

import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import typer
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from benchmarks import load
from benchmarks.servers import ARTIFACT, BENCH, LOGS, TISSUE, run_server
from benchmarks.tiles import load_tiles
from model.artifact import Manifest, Precision, read_manifest
from model.runtime import ort
from model.session import CUDA_OPTIONS, DeviceUnavailable, has_nvidia_driver, open_cuda_session

BATCHES = (1, 2, 4, 8, 16, 32, 64, 128, 256)
WORKERS = (1, 4, 8, 16)
SERVICE_CONNECTIONS = 256
WARM_UP_CALLS = 5
MATMUL_SIDE = 8192
STEM_FLOPS = {"patch": 0.03e9, "conv": 0.23e9, "efficientnet": 0.25e9}  # counted by hand, at 150 px and a width of 192
GRAPHS = BENCH / "gpu"

Attention = Literal["plain", "fused"]
Way = Literal["run", "bound", "captured"]
WAYS: tuple[Way, ...] = ("run", "bound", "captured")

out = Console()


@dataclass(frozen=True)
class Graph:
    precision: Literal["fp32", "tf32", "fp16"]
    attention: Attention
    path: Path


# -- graphs --------------------------------------------------------------------------------------------------------


def make_graphs(artifact: Path, manifest: Manifest, folder: Path) -> list[Graph]:
    """All precisions, each with plain and with fused attention, each file with its weights in it."""
    import onnx  # the training's dependency; loaded only where graphs are made
    from onnxruntime.transformers.float16 import convert_float_to_float16

    folder.mkdir(parents=True, exist_ok=True)
    graphs: list[Graph] = []
    for attention in ("plain", "fused"):
        proto = onnx.load(artifact / manifest.file("predict", "fp32").path)
        if attention == "fused" and fuse_attention(proto) != manifest.layers:
            raise ValueError(f"{manifest.name} has {manifest.layers} layers, but their attention was not recognised")
        fp32, fp16 = (folder / f"{attention}.{precision}.onnx" for precision in ("fp32", "fp16"))
        onnx.save(proto, fp32)
        onnx.save(convert_float_to_float16(proto, keep_io_types=True), fp16)
        graphs += [Graph("fp32", attention, fp32), Graph("tf32", attention, fp32), Graph("fp16", attention, fp16)]
    return graphs


def fuse_attention(proto: Any) -> int:
    """Puts ONNX's own Attention wherever softmax(q k / sqrt(d)) v is written out, and returns in how many places."""
    import onnx

    maker = {name: node for node in proto.graph.node for name in node.output}
    reader = {name: node for node in proto.graph.node for name in node.input}

    def trace(name: str, *kinds: str) -> str | None:
        """From a value back through nodes of these kinds, along their first inputs; None where another kind comes."""
        for kind in kinds:
            node = maker.get(name)
            if node is None or node.op_type != kind:
                return None
            name = node.input[0]
        return name

    fused = 0
    for softmax in [node for node in proto.graph.node if node.op_type == "Softmax"]:
        scores, mixed = maker.get(softmax.input[0]), reader.get(softmax.output[0])
        if scores is None or mixed is None or {scores.op_type, mixed.op_type} != {"MatMul"}:
            continue
        q = trace(scores.input[0], "Mul")
        k = trace(scores.input[1], "Mul", "Reshape", "Transpose", "Reshape")
        if q is None or k is None:
            continue
        node = onnx.helper.make_node("Attention", [q, k, mixed.input[1]], [mixed.output[0]])  # scale: 1 / sqrt(d)
        place = list(proto.graph.node).index(mixed)
        proto.graph.node.remove(mixed)
        proto.graph.node.insert(place, node)
        fused += 1
    proto.opset_import[0].version = max(23, proto.opset_import[0].version)  # the first that has Attention
    drop_unused(proto)
    return fused


def drop_unused(proto: Any) -> None:
    while True:
        wanted = {name for node in proto.graph.node for name in node.input} | {one.name for one in proto.graph.output}
        unused = [node for node in proto.graph.node if not wanted.intersection(node.output)]
        if not unused:
            return
        for node in unused:
            proto.graph.node.remove(node)


# -- the engine ----------------------------------------------------------------------------------------------------


def measure_engine(graph: Graph, way: Way, batch: int, side_px: int, seconds: float) -> float:
    """Images/s, from pixels in the host's memory to probabilities in the host's memory."""
    tiles = np.random.default_rng(0).integers(0, 256, (batch, side_px, side_px, 3), np.uint8)
    options = {"use_tf32": str(int(graph.precision == "tf32")), "enable_cuda_graph": str(int(way == "captured"))}
    session = open_cuda_session(graph.path, 1, CUDA_OPTIONS | options)
    return batch / time_call(prepare(session, way, tiles), seconds)


def try_batches(graph: Graph, way: Way, manifest: Manifest, seconds: float) -> list[float | str]:
    """A cell says `failed` where ONNX Runtime refuses, such as to capture a graph that is partly on the CPU."""
    speeds: list[float | str] = []
    for batch in BATCHES:
        try:
            speeds.append(measure_engine(graph, way, batch, manifest.tile_px, seconds))
        except Exception as error:  # it has many classes for its refusals
            out.print(
                f"{graph.precision} {graph.attention} {way} {batch}: {str(error)[:200]}", markup=False, highlight=False
            )
            speeds.append("failed")
    return speeds


def prepare(session: ort.InferenceSession, way: Way, tiles: NDArray[np.uint8]) -> Callable[[], Any]:
    if way == "run":
        return lambda: session.run(["probabilities"], {"tiles": tiles})
    classes = session.get_outputs()[1].shape[1]
    binding = session.io_binding()
    source = ort.OrtValue.ortvalue_from_numpy(tiles, "cuda", 0)
    target = ort.OrtValue.ortvalue_from_shape_and_type([len(tiles), classes], np.float32, "cuda", 0)
    binding.bind_ortvalue_input("tiles", source)
    binding.bind_ortvalue_output("probabilities", target)

    def call() -> Any:
        source.update_inplace(tiles)
        session.run_with_iobinding(binding)
        return target.numpy()

    return call


def time_call(call: Callable[[], Any], seconds: float) -> float:
    """Seconds per call, over at least `seconds` of calls."""
    for _ in range(WARM_UP_CALLS):
        call()
    calls, started = 0, time.perf_counter()
    while (elapsed := time.perf_counter() - started) < seconds:
        call()
        calls += 1
    return elapsed / calls


def flops_per_image(manifest: Manifest) -> float:
    """Of the stem and the transformer's blocks, a multiplication and an addition each; the head is next to nothing."""
    width, ratio, stem = (manifest.architecture.sizes[name] for name in ("width", "mlp_ratio", "stem"))
    assert isinstance(width, int) and isinstance(ratio, int | float)
    tokens = manifest.grid**2 + 1
    weights = (4 + 2 * ratio) * width**2  # q, k, v, projection; the MLP's two layers
    return STEM_FLOPS[str(stem)] + 2.0 * manifest.layers * tokens * (weights + 2 * tokens * width)


def measure_matmul() -> float | None:
    """FLOP/s of a large bf16 product in torch: what the card gives in practice. None without torch for CUDA."""
    try:
        import torch
    except ImportError:
        return None
    if not torch.cuda.is_available():
        return None
    a, b = (torch.randn(MATMUL_SIDE, MATMUL_SIDE, device="cuda", dtype=torch.bfloat16) for _ in range(2))

    def call() -> None:
        for _ in range(10):
            a @ b
        torch.cuda.synchronize()

    return 10 * 2 * MATMUL_SIDE**3 / time_call(call, 2)


# -- the service ---------------------------------------------------------------------------------------------------


def measure_service(artifact: Path, precision: Precision, workers: int, seconds: float) -> load.Load:
    tiles = load_tiles("jpeg")
    settings = {"TISSUE_DEVICE": "cuda", "TISSUE_PRECISION": precision, "TISSUE_WORKERS": str(workers)}
    with run_server(TISSUE, tiles[0], LOGS / "gpu.log", artifact, **settings) as running:
        bodies = [TISSUE.wrap(tile) for tile in tiles]
        load.drive(running.address, bodies, SERVICE_CONNECTIONS, 3)
        return load.drive(running.address, bodies, SERVICE_CONNECTIONS, seconds)


# -- tables --------------------------------------------------------------------------------------------------------


def tabulate_engine(
    speeds: dict[tuple[Graph, Way], list[float | str]], flops: float, matmul: float | None
) -> Iterator[list[str]]:
    for (graph, way), by_batch in speeds.items():
        best = max((speed for speed in by_batch if isinstance(speed, float)), default=0.0)
        share = "not measured" if matmul is None else f"{best * flops / matmul:.1%}"
        cells = [speed if isinstance(speed, str) else f"{speed:,.0f}" for speed in by_batch]
        yield [graph.precision, graph.attention, way, *cells, share]


def print_table(title: str, header: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    table = Table(title=title, title_justify="left")
    for name in header:
        table.add_column(name, justify="right")
    for row in rows:
        table.add_row(*row)
    out.print(table)


@contextmanager
def clear_refusal() -> Iterator[None]:
    try:
        yield
    except (DeviceUnavailable, ValueError, OSError) as error:
        out.print(f"{type(error).__name__}: {error}", markup=False, highlight=False, soft_wrap=True)
        raise typer.Exit(1) from error


def check_gpu() -> None:
    if not has_nvidia_driver():
        raise DeviceUnavailable("no NVIDIA driver is here, so there is nothing to measure; run this on a GPU machine")


def main(
    seconds: Annotated[float, typer.Option(help="Length of each measurement.")] = 2,
    artifact: Annotated[Path, typer.Option(help="Directory with the artefact to measure.")] = ARTIFACT,
) -> None:
    """Measure this machine's GPU with the engine alone and with the service."""
    with clear_refusal():
        check_gpu()
        manifest = read_manifest(artifact)
        graphs = make_graphs(artifact, manifest, GRAPHS)
        matmul = measure_matmul()
        out.print(
            "bf16 ceiling not measured: torch for CUDA is not installed"
            if matmul is None
            else f"bf16 ceiling: {matmul / 1e12:.0f} TFLOP/s (torch, {MATMUL_SIDE} x {MATMUL_SIDE})"
        )
        speeds = {(graph, way): try_batches(graph, way, manifest, seconds) for graph in graphs for way in WAYS}
        rows = tabulate_engine(speeds, flops_per_image(manifest), matmul)
        header = ["precision", "attention", "call", *map(str, BATCHES), "share of bf16"]
        print_table("Engine alone, images/s by batch", header, rows)

        if shutil.which("wrk") is None:
            out.print("service not measured: wrk is not installed")
            return
        loads = {
            (precision, workers): measure_service(artifact, precision, workers, 5 * seconds)
            for precision in manifest.precisions()
            if precision != "int8"
            for workers in WORKERS
        }
        print_table(
            f"Service, JPEG tiles, {SERVICE_CONNECTIONS} connections",
            ["precision", "workers", "requests/s", "p50 ms", "p99 ms", "errors"],
            [
                [precision, str(n), f"{one.good_per_s:,.0f}", f"{one.p50_ms:.1f}", f"{one.p99_ms:.1f}", str(one.errors)]
                for (precision, n), one in loads.items()
            ],
        )


if __name__ == "__main__":
    typer.run(main)
