import pytest
from PIL import Image

from benchmarks import report
from benchmarks.comparison import Sample
from benchmarks.report import best_peer, ceiling_per_s, share_of_ceiling, speed, spread, table, write
from benchmarks.soak import Soak

CONNECTIONS = [1, 8, 32, 100]
SPEEDS = {"tissue": 225.0, "tissue_int8": 300.0, "fastapi_def": 150.0, "mosec": 160.0}


def make_samples() -> list[Sample]:
    """As of three rounds with known speeds: the middle one as in SPEEDS, one 10 slower, one 20 faster."""
    versions = {"tissue": {"onnxruntime": "1.0"}, "mosec": {"mosec": "0.9"}}
    samples: list[Sample] = [
        {
            "step": "setup", "kind": "setup", "cores": 2, "machine": "x86_64", "python": "3.11", "seconds": 5.0,
            "rounds": 3, "connections": CONNECTIONS, "skipped": ["ray"], "own_tiles": False, "jpeg_bytes": 7000,
            "png_bytes": 40000, "model": "default", "model_digest": "0123456789abcdef", "tissue": "0.1.0",
            "versions": versions,
        }
    ]  # fmt: skip
    for off in (0.0, -10.0, 20.0):
        for precision, best in (("fp32", 250.0), ("int8", 400.0)):
            ways = {"alone_per_s": {"1": best - 100, "8": best - 50}, "crowd_per_s": {"1": best + off, "8": best - 20}}
            lone = {"decoding_crowd_per_s": best - 30, "lone_p50_ms": 5.0, "lone_p99_ms": 8.0}
            samples.append({"step": "ceiling", "kind": "ceiling", "precision": precision, **ways, **lone})
        for name, per_s in SPEEDS.items():
            for form, connections in [*(("jpeg", n) for n in CONNECTIONS), ("png", 32)]:
                samples.append(
                    {
                        "step": "visit", "kind": "load", "server": name, "form": form, "connections": connections,
                        "good_per_s": per_s + off, "cpu_ms_per_request": 8.0, "other_cores": 0.01,
                        "p50_ms": 4.0, "p95_ms": 6.0,
                        "p99_ms": 1000 / per_s, "bad_status": 1, "broken": 0, "timed_out": 0,
                    }
                )  # fmt: skip
            cost = {"start_s": 1.5, "idle_cores": 0.01, "peak_rss_mib": 200.0}
            samples.append({"step": "visit", "kind": "visit", "server": name, **cost})
    samples.append({"step": "flood", "kind": "flood", "server": "tissue", **FLOOD})
    mixture = {"good_sent": 700, "good_failed": 0, "bad_sent": 100, "bad_statuses": {"422": 100}}
    samples.append({"step": "flood", "kind": "mixture", "server": "tissue", **mixture})
    for measure, column, values in (
        ("connections", "connections", (1, 8, 32)),
        ("queue", "waiting", (1, 32, 512)),
        ("image size", "side_px", (150, 1000, 4000)),
        ("workers", "workers", (1, 2, 4)),
    ):
        figures = {"good_per_s": 200.0, "p50_ms": 5.0, "p99_ms": 9.0, "errors": 0, "peak_rss_mib": 210.0}
        samples += [{"step": f"growth {measure}", "kind": "growth", column: value, **figures} for value in values]
    return samples


FLOOD = {
    "offered_per_s": 450.0, "peak_per_s": 225.0, "goodput_per_s": 207.0, "seconds": 10.0, "sent": 4500, "good": 2100,
    "good_in_window": 2070, "good_within_1_s": 1000, "refused": 2350, "others": {"unanswered": 50}, "p50_ms": 900.0,
    "p99_ms": 1400.0, "refusal_p99_ms": 6.0, "generator_cpu_s": 0.4,
}  # fmt: skip


@pytest.fixture
def samples() -> list[Sample]:
    return make_samples()


def test_a_spread_is_median_and_range():
    found = spread([3.0, 1.0, 10.0])
    assert (found.middle, found.low, found.high, found.n) == (3.0, 1.0, 10.0, 3)
    with pytest.raises(ValueError, match="nothing was measured"):
        spread([])


def test_the_ceiling_is_the_best_way_by_its_median(samples):
    assert ceiling_per_s(samples, "fp32") == 250 and ceiling_per_s(samples, "int8") == 400


def test_shares_are_of_the_ceiling_of_the_same_precision(samples):
    assert share_of_ceiling(samples, "tissue", 8) == 225 / 250
    assert share_of_ceiling(samples, "tissue_int8", 8) == 300 / 400


def test_the_best_peer_is_none_of_ours(samples):
    assert best_peer(samples, 32) == ("mosec", 160.0)


def test_png_and_jpeg_are_not_mixed(samples):
    assert speed(samples, "tissue", 32, "png").n == speed(samples, "tissue", 32).n == 3


def test_a_table_is_markdown():
    assert table(["a", "b"], [["1", "2"]]) == "| a | b |\n| --- | ---: |\n| 1 | 2 |\n"


def test_aims_are_judged_by_the_figures(samples):
    soak = Soak(requests=[0, 50_000, 100_000], rss_mib=[180.0, 200.0, 203.5], errors=0, peak_rss_mib=204.0)
    rows = report.table_of_targets(samples, soak).splitlines()
    found = {row.split("|")[1].strip(): [cell.strip() for cell in row.split("|")[2:4]] for row in rows}
    assert found["share of the ceiling at 8, at least 0.90"] == ["0.90", "yes"]
    assert found["over the best peer (mosec) at 8, at least 1.25"] == ["1.41", "yes"]
    assert found["p99 at 32, of the lowest of the peers' (mosec), below 1"] == ["0.71", "yes"]
    assert found["p99 at 1, of decode and bare call, at most 1.25"] == ["0.56", "yes"]
    assert found["goodput at twice the peak, of the peak, at least 0.9"] == ["0.92", "yes"]
    assert found["memory gained over their last half, under 2 MiB"] == ["+3.5 MiB", "no"]


@pytest.mark.parametrize(
    ("skipped", "missing", "kept"),
    [
        ({"tissue_int8"}, "int8 over fp32", "share of the ceiling at 8"),
        ({"tissue"}, "share of the ceiling at 8", "memory gained"),
        ({"fastapi_def", "mosec"}, "over the best peer", "int8 over fp32"),
    ],
)
def test_a_server_that_was_left_out_takes_its_rows_with_it(samples, tmp_path, skipped, missing, kept):
    measured = [one for one in samples if one.get("server") not in skipped]
    write(measured, Soak([0, 10], [1.0, 2.0], errors=0, peak_rss_mib=2.0), tmp_path / "report.md")
    text = (tmp_path / "report.md").read_text()
    assert (
        missing not in text and kept in text and not any(f"| **{report.TITLES[name]}** |" in text for name in skipped)
    )


def test_what_was_left_out_is_said(samples):
    assert "Left out: Ray Serve." in report.describe_run(samples)


def test_the_page_gets_tables_and_pictures_between_its_marks(samples, tmp_path):
    page = tmp_path / "benchmarks.md"
    page.write_text("before\n<!-- figures -->\nold\n<!-- end of figures -->\nafter\n")
    write(samples, None, page)
    text = page.read_text()
    assert text.startswith("before\n<!-- figures -->\n") and text.endswith("<!-- end of figures -->\nafter\n")
    assert "old" not in text and "| **tissue** | 225 (215 to 245) = 0.90 |" in text
    for name in ("speed", "latency", "growth"):
        assert f"images/benchmark-{name}.png" in text
        with Image.open(tmp_path / "images" / f"benchmark-{name}.png") as picture:
            assert picture.width > 600
    write(samples, None, page)
    assert page.read_text() == text


def test_a_page_that_is_not_there_is_begun(samples, tmp_path):
    write(samples, None, tmp_path / "report.md")
    assert (tmp_path / "report.md").read_text().startswith("# Benchmarks\n\n<!-- figures -->\n\nMachine: 2 x86_64")


def test_a_page_without_marks_is_left_alone(samples, tmp_path):
    page = tmp_path / "benchmarks.md"
    page.write_text("mine\n")
    with pytest.raises(ValueError, match="no lines <!-- figures -->"):
        write(samples, None, page)
    assert page.read_text() == "mine\n"


def test_no_results_are_said(tmp_path):
    with pytest.raises(ValueError, match="there are no results yet"):
        write([], None, tmp_path / "benchmarks.md")
