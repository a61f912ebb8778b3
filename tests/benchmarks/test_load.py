import pytest

from benchmarks.load import Load, WrkFailed, parse

PRINTED = """Running 2s test @ http://127.0.0.1:8000/predict
  1 threads and 8 connections
Requests/sec:    243.02

{"requests": 500, "seconds": 2.000000, "bad_status": 20, "broken": 1, "timed_out": 2, "p50_ms": 30.5, \
"p95_ms": 55.0, "p99_ms": 80.125, "max_ms": 99.0}
"""


def test_figures_are_read_from_the_last_line():
    found = parse(PRINTED)
    assert (found.requests, found.p99_ms, found.errors) == (500, 80.125, 23)


def test_only_good_answers_count_as_speed():
    assert parse(PRINTED).good_per_s == (500 - 20) / 2


def test_errors_are_of_all_kinds():
    assert Load(10, 1, 1, 2, 4, 0, 0, 0, 0).errors == 7


def test_wrk_without_figures_is_told_with_its_own_words():
    with pytest.raises(WrkFailed, match="unable to connect"):
        parse("", "unable to connect to 127.0.0.1:1 Connection refused\n")
