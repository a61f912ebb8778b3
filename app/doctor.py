"""What this machine, this installation and this artefact are, and what to do about what is wrong with them."""

import importlib.metadata
import os
import platform
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from app.settings import Settings
from model.artifact import CorruptArtifact, read_manifest, verify_files
from model.runtime import ort
from model.session import Classifier, DeviceUnavailable, available_cores, has_nvidia_driver, open_classifier

MEASURE_S = 1.0  # long enough that one pause of the scheduler doesn't count


@dataclass(frozen=True)
class Finding:
    subject: str
    text: str
    advice: str = ""  # empty where nothing is wrong


def examine(settings: Settings) -> Iterator[Finding]:
    """One finding after the other, since the last ones take seconds."""
    yield Finding("tissue", f"{importlib.metadata.version('tissue')}")
    yield Finding("python", f"{platform.python_version()} on {platform.platform()}, {sys.executable}")
    yield examine_runtime()
    yield examine_device(settings)
    yield examine_threads(settings)
    artifact = examine_artifact(settings)
    yield artifact
    if not artifact.advice:
        yield from examine_answers(settings)


def examine_runtime() -> Finding:
    installed = {name: version for name in ("onnxruntime", "onnxruntime-gpu") if (version := find_version(name))}
    wheels = ", ".join(f"{name} {version}" for name, version in installed.items())
    advice = ""
    if len(installed) > 1:
        advice = "two wheels share one folder and break each other: pip uninstall both, then install tissue again"
    return Finding("onnxruntime", f"{ort.__version__} ({wheels})", advice)


def examine_device(settings: Settings) -> Finding:
    providers = [name.removesuffix("ExecutionProvider") for name in ort.get_available_providers()]
    driver = "an NVIDIA driver" if has_nvidia_driver() else "no NVIDIA driver"
    advice = ""
    if settings.device == "cuda" and not has_nvidia_driver():
        advice = "a GPU is asked for: install its driver, start the container with --gpus all, or set TISSUE_DEVICE=cpu"
    return Finding("device", f"{settings.device} asked for; {driver}; built for {', '.join(providers)}", advice)


def examine_threads(settings: Settings) -> Finding:
    granted = available_cores()
    asked = {"TISSUE_INFER_THREADS": settings.infer_threads or 1, "TISSUE_INTRA_THREADS": settings.intra_threads or 1}
    too_many = [name for name in asked if asked[name] > granted]  # they would slow each other down
    advice = "; ".join(f"{name} is {asked[name]}: unset it, or take at most {granted}" for name in too_many)
    return Finding("threads", f"{granted} of the machine's {os.cpu_count()} cores granted", advice)


def examine_artifact(settings: Settings) -> Finding:
    try:
        manifest = read_manifest(settings.artifact)
        verify_files(manifest, settings.artifact)
    except CorruptArtifact as error:
        return Finding("artifact", str(error), "set TISSUE_ARTIFACT to a whole artefact, or install tissue again")
    classes = ", ".join(manifest.class_names)
    return Finding("artifact", f"{manifest.name} {manifest.version} in {settings.artifact}: {classes}")


def examine_answers(settings: Settings) -> Iterator[Finding]:
    """How the golden tile is answered on the device and in the precision asked for, and how fast others are."""
    try:
        classifier = open_classifier(settings.artifact, settings.device, settings.precision, settings.intra_threads)
    except CorruptArtifact as error:
        yield Finding("golden tile", str(error), "try TISSUE_PRECISION=fp32 and TISSUE_DEVICE=cpu, then install again")
        return
    except DeviceUnavailable as error:
        yield Finding("golden tile", str(error), "pip install 'tissue[cuda]', or set TISSUE_DEVICE=cpu")
        return
    yield Finding("golden tile", f"answered as expected, {classifier.precision} on {classifier.device}")
    yield examine_speed(classifier)


def examine_speed(classifier: Classifier) -> Finding:
    side_px = classifier.manifest.tile_px
    tile = np.random.default_rng(0).integers(0, 256, (1, side_px, side_px, 3), np.uint8)
    callers = available_cores() if classifier.device == "cpu" else 1
    alone = measure_rate(lambda: classifier.predict(tile), 1)
    crowd = measure_rate(lambda: classifier.predict(tile, alone=callers == 1), callers)
    return Finding("images/s", f"{alone:.0f} one after the other, {crowd:.0f} with {callers} side by side")


def measure_rate(call: Callable[[], object], callers: int) -> float:
    """Calls per second when `callers` threads call without a pause."""
    call()
    start = time.perf_counter()

    def keep_calling() -> int:
        calls = 0
        while time.perf_counter() - start < MEASURE_S:
            call()
            calls += 1
        return calls

    with ThreadPoolExecutor(callers) as pool:
        calls = sum(pool.map(lambda _: keep_calling(), range(callers)))
    return calls / (time.perf_counter() - start)


def find_version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None
