import json
from pathlib import Path

import pytest

from benchmarks.comparison import Comparison, carry_out, drop_disturbed, find_peak, read_samples, rounded
from benchmarks.servers import SERVERS


class Pretended(Comparison):
    """The order and the file are the real ones; what a step would take minutes to find is made up."""

    def describe_setup(self):
        return [{"kind": "setup", **self.describe_conditions()}]

    def measure_ceiling(self, precision):
        return [{"kind": "ceiling", "precision": precision}]

    def visit(self, server):
        return [{"kind": "visit", "server": server.name}, {"kind": "load", "server": server.name, "other_cores": 0.01}]

    def overwhelm(self, server):
        return [{"kind": "flood", "server": server.name}]

    def grow(self, measure):
        return [{"kind": "growth"}]


def plan(results: Path, **changes) -> Comparison:
    options = {"servers": SERVERS[:3], "skipped": ["ray"], "seconds": 1.0, "rounds": 2, "folder": None}
    return Pretended(**{**options, **changes}, results=results)


def test_servers_take_turns(tmp_path):
    names = [step.name for step in plan(tmp_path / "r").steps() if step.name.startswith("visit")]
    assert names == [f"visit {server.name} {number}" for number in (0, 1) for server in SERVERS[:3]]


def test_a_run_that_was_stopped_goes_on_where_it_was(tmp_path):
    results = tmp_path / "results.jsonl"
    first: list[str] = []

    def stop_after_four(step: str) -> None:
        first.append(step)
        if len(first) == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        carry_out(plan(results), announce=stop_after_four)
    rest: list[str] = []
    assert carry_out(plan(results), announce=rest.append)
    assert [*first[:4], *rest] == [step.name for step in plan(results).steps()]
    assert carry_out(plan(results), announce=lambda step: pytest.fail(f"{step} was repeated"))


def test_a_step_whose_last_line_was_cut_is_taken_again_as_a_whole(tmp_path):
    results = tmp_path / "results.jsonl"
    carry_out(plan(results))
    whole = results.read_text().splitlines(keepends=True)
    cut = next(n for n, line in enumerate(whole) if '"kind": "load"' in line)
    results.write_text("".join(whole[:cut]) + whole[cut][:20])
    assert [sample["step"] for sample in read_samples(results)] == [
        json.loads(line)["step"] for line in whole[: cut - 1]
    ]
    again: list[str] = []
    carry_out(plan(results), announce=again.append)
    assert again[0] == json.loads(whole[cut])["step"]
    assert results.read_text().splitlines(keepends=True) == whole


def test_a_damaged_line_amid_others_is_named(tmp_path):
    results = tmp_path / "results.jsonl"
    carry_out(plan(results))
    results.write_text(results.read_text().replace('"kind": "ceiling"', '"kind": "ceil', 1))
    with pytest.raises(ValueError, match=r"line 2 of .*results\.jsonl is damaged .*, expected JSON: take it and"):
        read_samples(results)


def test_what_grows_is_ours_alone(tmp_path):
    names = [step.name for step in plan(tmp_path / "r", servers=SERVERS[1:3]).steps()]
    assert not [name for name in names if name.startswith("growth")]


def test_no_step_starts_after_the_limit(tmp_path):
    results = tmp_path / "results.jsonl"
    assert not carry_out(plan(results), limit_s=-1)
    assert read_samples(results) == []


def test_a_run_with_other_options_is_not_mixed_in(tmp_path):
    results = tmp_path / "results.jsonl"
    carry_out(plan(results))
    with pytest.raises(ValueError, match=r"holds a run under other conditions .*'seconds': \(1.0, 3.0\)"):
        carry_out(plan(results, seconds=3.0))
    results.write_text(results.read_text().replace('"cores": ', '"cores": 1', 1))
    with pytest.raises(ValueError, match="'cores'"):  # another machine's
        plan(results).check_conditions()


def test_disturbed_visits_are_repeated_and_no_others(tmp_path):
    results = tmp_path / "results.jsonl"
    carry_out(plan(results))
    disturbed = results.read_text().replace('"server": "fastapi_def", "other_cores": 0.01', '"other_cores": 0.9', 1)
    results.write_text(disturbed)
    assert drop_disturbed(results, most_other_cores=0.2) == ["visit fastapi_def 0"]
    again: list[str] = []
    carry_out(plan(results), announce=again.append)
    assert again == ["visit fastapi_def 0"]
    assert drop_disturbed(results, most_other_cores=0.2) == []


def test_the_peak_is_the_best_median():
    def sample(connections: int, good_per_s: float) -> dict[str, object]:
        return {
            "kind": "load", "server": "a", "form": "jpeg", "connections": connections, "good_per_s": good_per_s
        }  # fmt: skip

    samples = [sample(1, 300), sample(1, 10), sample(1, 20), sample(8, 30), sample(8, 25), sample(8, 35)]
    assert find_peak(samples, "a") == 30


def test_figures_are_kept_to_five_digits():
    found = rounded({"a": 123.456789, "n": 1234567, "inner": {"b": 0.000123456789}})
    assert json.dumps(found) == '{"a": 123.46, "n": 1234567, "inner": {"b": 0.00012346}}'
