"""A verified artefact in ONNX Runtime: uint8 tiles in, predictions and maps out.

`open_classifier` refuses an artefact that is damaged, and a device that isn't there, before the first answer.
"""

import ctypes
import logging
import os
import sys
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from model.artifact import MANIFEST, CorruptArtifact, Device, Manifest, Precision, digest, read_manifest, verify_files
from model.runtime import ort
from model.scope import Reference, read_reference

Floats = NDArray[np.float32]
Tiles = NDArray[np.uint8]

# On a GPU a batch is padded to one of these, so that memory and the search for kernels stay bounded.
CUDA_BATCHES = (1, 2, 4, 8, 16, 32, 64)
# Without TF32, ONNX Runtime's own choice, which would move probabilities in their third decimal: fp32 means the same
# on every device.
CUDA_OPTIONS = {"cudnn_conv_algo_search": "HEURISTIC", "arena_extend_strategy": "kSameAsRequested", "use_tf32": "0"}

_state = ort.capi.onnxruntime_pybind11_state
UNREADABLE = (_state.InvalidGraph, _state.InvalidProtobuf, _state.InvalidArgument, _state.NotImplemented, _state.Fail)

WITHOUT_GPU = "`tissue doctor` says more; TISSUE_DEVICE=cpu does without"

log = logging.getLogger(__name__)


class DeviceUnavailable(RuntimeError):
    pass


@dataclass(frozen=True)
class Predictions:
    logits: Floats  # (N, K)
    probabilities: Floats  # (N, K), calibrated
    features: Floats  # (N, D)


@dataclass(frozen=True)
class Explanations(Predictions):
    attention: Floats  # (N, L, H, G, G); without layers and heads where the network has no attention
    rollout: Floats  # (N, G, G), or (N, 0, 0)
    evidence: Floats  # (N, K, G, G)


class Sessions(NamedTuple):
    """One graph, open for a caller that comes alone and for many side by side; on a GPU one session serves both."""

    alone: ort.InferenceSession
    crowd: ort.InferenceSession


@dataclass(frozen=True)
class Classifier:
    """Thread-safe: ONNX Runtime lets many threads run one session.

    On a CPU the predict graph is open twice, for callers that come alone and for many side by side: one call on all
    cores answers soonest, one call a core answers most. Both give the same digits. Of the explain graph they wouldn't
    (sums of its maps are split among threads), so that is open once, with one thread.
    """

    manifest: Manifest
    digest: str  # sha256 of the manifest, which lists the sha256 of all else
    device: Device
    precision: Precision  # of the predict graph
    explain_precision: Precision
    reference: Reference | None  # None where the artefact has none
    predict_sessions: Sessions
    explain_session: ort.InferenceSession

    def predict(self, tiles: Tiles, *, alone: bool = True) -> Predictions:
        session = self.predict_sessions.alone if alone else self.predict_sessions.crowd
        return Predictions(**self._run(session, {"tiles": tiles}))

    def explain(self, tiles: Tiles, keep: NDArray[np.bool_] | None = None) -> Explanations:
        if keep is None:
            keep = np.ones((len(tiles), self.manifest.grid**2), bool)
        answer = self._run(self.explain_session, {"tiles": tiles, "keep": keep})
        return Explanations(**(empty_maps(len(tiles), self.manifest) | answer))

    def _run(self, session: ort.InferenceSession, inputs: dict[str, NDArray[Any]]) -> dict[str, Floats]:
        arrays = session.run(None, inputs) if self.device == "cpu" else run_bound(session, inputs)
        return dict(zip((output.name for output in session.get_outputs()), arrays, strict=True))


def empty_maps(n: int, manifest: Manifest) -> dict[str, Floats]:
    """These stand for the maps that a network doesn't have."""
    methods, g = manifest.maps.methods, manifest.grid
    empty: dict[str, Floats] = {}
    if "attention" not in methods:
        empty["attention"] = np.zeros((n, 0, 0, g, g), np.float32)
    if "rollout" not in methods:
        empty["rollout"] = np.zeros((n, 0, 0), np.float32)
    return empty


def open_classifier(
    path: Path,
    device: Literal["auto", Device] = "auto",
    precision: Literal["auto", Precision] = "auto",
    intra_threads: int | None = None,
) -> Classifier:
    if device != "auto":
        return open_on(device, path, precision, intra_threads)
    if has_nvidia_driver():
        try:
            return open_on("cuda", path, precision, intra_threads)
        except DeviceUnavailable as error:
            log.warning("%s. Until then the CPU answers", error)
    return open_on("cpu", path, precision, intra_threads)


def open_on(device: Device, path: Path, precision: Literal["auto", Precision], intra_threads: int | None) -> Classifier:
    manifest = read_manifest(path)
    verify_files(manifest, path)
    if precision == "auto":
        precision = "fp32"
    if precision not in manifest.precisions():
        raise CorruptArtifact(f"{path} has no {precision} graphs, only {manifest.precisions()}")

    predict = path / manifest.file("predict", precision).path
    # int8 is for speed; a map is asked for to be looked at, and there is no int8 of it
    explain_precision: Precision = "fp16" if precision == "fp16" else "fp32"
    explain = path / manifest.file("explain", explain_precision).path
    classifier = Classifier(
        manifest=manifest,
        digest=digest(path / MANIFEST),
        device=device,
        precision=precision,
        explain_precision=explain_precision,
        reference=read_reference(path / manifest.file("reference").path, manifest.feature_width)
        if manifest.has("reference")
        else None,
        predict_sessions=open_predict_sessions(predict, device, intra_threads or available_cores()),
        explain_session=open_listed(explain, device, 1),
    )
    check_shapes(classifier)
    check_golden(classifier, load_golden(path, manifest))
    return classifier


def open_predict_sessions(path: Path, device: Device, threads: int) -> Sessions:
    alone = open_listed(path, device, threads)
    crowd = alone if device == "cuda" or threads == 1 else open_listed(path, device, 1)
    return Sessions(alone, crowd)


def open_listed(path: Path, device: Device, threads: int) -> ort.InferenceSession:
    """A graph that the manifest lists: what can't be run is the artefact's fault."""
    try:
        return open_session(path, threads) if device == "cpu" else open_cuda_session(path, threads, CUDA_OPTIONS)
    except UNREADABLE as error:
        raise CorruptArtifact(f"{path} is not a graph that onnxruntime {ort.__version__} can run: {error}") from error


def open_session(graph: Path | bytes, threads: int) -> ort.InferenceSession:
    """On the CPU, with the options that serving has. 0 threads are as many as the machine has cores."""
    return ort.InferenceSession(graph, make_options(threads), providers=["CPUExecutionProvider"])


def make_options(threads: int) -> ort.SessionOptions:
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3  # errors
    # Within a call its threads wait for each other awake, which is a sixth faster; after it they sleep.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    return options


def open_cuda_session(path: Path, threads: int, cuda: dict[str, str]) -> ort.InferenceSession:
    """`cuda` are options of ONNX Runtime's CUDA provider."""
    providers = [("CUDAExecutionProvider", cuda), "CPUExecutionProvider"]
    try:
        with redirect_stdout(sys.stderr):  # it reports missing libraries on stdout, where answers may be going
            ort.preload_dlls()  # the CUDA libraries that pip installed, where there are any
        session = ort.InferenceSession(path, make_options(threads), providers=providers)
    except Exception as error:  # the GPU is too old, or full; an artefact's graphs were verified before
        raise DeviceUnavailable(f"the GPU could not take {path}: {error}. {WITHOUT_GPU}") from error
    session.disable_fallback()
    if session.get_providers()[0] != "CUDAExecutionProvider":  # never silently on the CPU
        raise DeviceUnavailable(
            f"there is no CUDA for onnxruntime {ort.__version__}, which could only load {session.get_providers()}: "
            f"pip install 'tissue[cuda]' brings its libraries. {WITHOUT_GPU}"
        )
    return session


def run_bound(session: ort.InferenceSession, inputs: dict[str, NDArray[Any]]) -> list[Floats]:
    """On a GPU: padded to a known batch, outputs bound, so that each is copied back once."""
    n = len(next(iter(inputs.values())))
    size = next((size for size in CUDA_BATCHES if size >= n), n)
    binding = session.io_binding()
    for name, array in inputs.items():
        padded = np.concatenate([array, np.repeat(array[-1:], size - n, axis=0)])
        binding.bind_ortvalue_input(name, ort.OrtValue.ortvalue_from_numpy(padded, "cuda", 0))
    for output in session.get_outputs():
        binding.bind_output(output.name, "cuda", 0)
    session.run_with_iobinding(binding)
    return [output[:n] for output in binding.copy_outputs_to_cpu()]


def check_shapes(classifier: Classifier) -> None:
    m = classifier.manifest
    tiles = np.full((2, m.tile_px, m.tile_px, 3), 255, np.uint8)
    k, g = len(m.classes), m.grid
    try:
        predicted, explained = classifier.predict(tiles), classifier.explain(tiles)
    except Exception as error:  # a graph with other inputs; onnxruntime has many classes for it
        if classifier.device == "cuda":
            raise DeviceUnavailable(f"the GPU could not run {m.name}: {error}. {WITHOUT_GPU}") from error
        raise CorruptArtifact(f"{m.name} does not take tiles {tiles.shape} as its manifest says: {error}") from error
    expected = {
        "logits": (2, k),
        "probabilities": (2, k),
        "features": (2, m.feature_width),
        "attention": (2, m.layers, m.heads, g, g),
        "rollout": (2, g, g) if "rollout" in m.maps.methods else (2, 0, 0),
        "evidence": (2, k, g, g),
    }
    for answer in (predicted, explained):
        for name, array in vars(answer).items():
            if array.shape != expected[name]:
                raise CorruptArtifact(f"{m.name}: {name} has shape {array.shape}, the manifest means {expected[name]}")


def load_golden(path: Path, manifest: Manifest) -> Tiles:
    golden = path / manifest.file("golden").path
    try:
        with Image.open(golden) as image:
            tile = np.asarray(image.convert("RGB"))[None]
    except (OSError, Image.DecompressionBombError) as error:
        raise CorruptArtifact(f"{golden} is no picture that can be read: {error}") from error
    expected = (1, manifest.tile_px, manifest.tile_px, 3)
    if tile.shape != expected:
        raise CorruptArtifact(f"{golden} has the shape {tile.shape}, the manifest means {expected}")
    return tile


def check_golden(classifier: Classifier, tile: Tiles) -> None:
    """The golden tile's answer is known: both graphs must give it on this device and in this precision."""
    golden = classifier.manifest.golden
    expected = np.array(golden.probabilities)
    for graph, precision, answer in (
        ("predict", classifier.precision, classifier.predict(tile)),
        ("explain", classifier.explain_precision, classifier.explain(tile)),
    ):
        found, tolerance = answer.probabilities[0], golden.tolerance[precision]
        if not np.abs(found - expected).max() <= tolerance:  # `not <=` so that nan is refused as well
            # The graphs are what the manifest lists: on a GPU it is the GPU that isn't fit for them.
            refusal = DeviceUnavailable if classifier.device == "cuda" else CorruptArtifact
            raise refusal(
                f"the golden tile is answered wrongly by {graph} in {precision} on {classifier.device}: "
                f"expected {expected.round(4).tolist()} within {tolerance}, found {found.round(4).tolist()}; "
                "another precision or device may do"
            )


def has_nvidia_driver() -> bool:
    if "CUDAExecutionProvider" not in ort.get_available_providers():
        return False
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        return False
    return True


def available_cores() -> int:
    """What the scheduler and the container grant, not what the machine has."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
    except (OSError, ValueError):  # no cgroup v2 here
        return cores
    if quota == "max":
        return cores
    return max(1, min(cores, round(int(quota) / int(period))))
