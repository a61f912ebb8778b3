from threading import current_thread

from benchmarks.ceiling import BATCHES, Ceiling, measure, time_calls
from benchmarks.tiles import load_tiles
from model.artifact import read_manifest


def test_every_way_is_measured(tiny_artifact):
    manifest = read_manifest(tiny_artifact)
    graph = tiny_artifact / manifest.file("predict", "fp32").path
    found = measure(graph, load_tiles("jpeg")[:2], manifest.tile_px, manifest.tile_mpp, cores=2, seconds=0.05)
    assert set(found.alone_per_s) == set(found.crowd_per_s) == {str(size) for size in BATCHES}
    assert min(*found.alone_per_s.values(), *found.crowd_per_s.values(), found.decoding_crowd_per_s) > 1
    assert 0 < found.lone_p50_ms <= found.lone_p99_ms


def test_the_ceiling_is_the_best_of_all():
    assert Ceiling({"1": 3.0}, {"1": 2.0, "8": 5.0}, 9.0, 1.0, 1.0).best_per_s == 5.0


def test_callers_call_side_by_side():
    callers = set()
    took_s = time_calls(lambda: callers.add(current_thread().name), 3, 0.02)
    assert len(callers) == 3 and len(took_s) > 3
