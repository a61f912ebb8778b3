"""Samples -> medians and ratios -> tables and pictures on a page, such as docs/benchmarks.md."""

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from matplotlib.ticker import NullLocator, ScalarFormatter

from benchmarks import growth
from benchmarks.comparison import MIX_CONNECTIONS, OVERLOAD, PNG_CONNECTIONS, WARM_UP_S, Sample
from benchmarks.overload import PATIENCE_S
from benchmarks.servers import SERVERS
from benchmarks.soak import Soak
from training.figures import BLUE, GREEN, INK, NORMAL, ORANGE, PURPLE, SMALL, save, soften, start_figure

TITLES = {server.name: server.title for server in SERVERS}
OURS = frozenset(server.name for server in SERVERS if server.is_ours)
PRECISION = {name: "int8" if name.endswith("int8") else "fp32" for name in TITLES}
NEW_PAGE = "# Benchmarks\n\n<!-- figures -->\n<!-- end of figures -->\n"
FIGURES = re.compile(r"(<!-- figures -->\n).*(<!-- end of figures -->)", re.DOTALL)
STYLES = {  # dashes and markers tell apart what shares a colour
    "tissue": (BLUE, "-", "o"),
    "tissue_int8": (BLUE, "--", "s"),
    "fastapi_def": (ORANGE, "-", "^"),
    "fastapi_def_1": (ORANGE, "--", "v"),
    "fastapi_async": (ORANGE, ":", "<"),
    "litserve": (GREEN, "-", "D"),
    "mosec": (PURPLE, "-", "P"),
    "bentoml": (GREEN, "--", "X"),
    "ray": (PURPLE, "--", "*"),
}


@dataclass(frozen=True)
class Spread:
    """Median of the rounds, and the range they span."""

    middle: float
    low: float
    high: float
    n: int


def spread(values: Iterable[float]) -> Spread:
    ascending = sorted(values)
    if not ascending:
        raise ValueError("nothing was measured")
    return Spread(median(ascending), ascending[0], ascending[-1], len(ascending))


def pick(samples: Sequence[Sample], kind: str, **wanted: Any) -> list[Sample]:
    return [
        sample
        for sample in samples
        if sample["kind"] == kind and all(sample[name] == value for name, value in wanted.items())
    ]


def measured_servers(samples: Sequence[Sample]) -> list[str]:
    """In the order of `SERVERS`."""
    measured = {sample["server"] for sample in pick(samples, "load")}
    return [name for name in TITLES if name in measured]


def speed(samples: Sequence[Sample], server: str, connections: int, form: str = "jpeg") -> Spread:
    return spread(s["good_per_s"] for s in pick(samples, "load", server=server, connections=connections, form=form))


def ceiling_per_s(samples: Sequence[Sample], precision: str) -> float:
    """The best configuration, each by the median of its rounds."""
    rounds = pick(samples, "ceiling", precision=precision)
    ways = [(way, size) for way in ("alone_per_s", "crowd_per_s") for size in rounds[0][way]]
    return max(float(median(one[way][size] for one in rounds)) for way, size in ways)


def share_of_ceiling(samples: Sequence[Sample], server: str, connections: int) -> float:
    """Of the precision that the server uses."""
    return speed(samples, server, connections).middle / ceiling_per_s(samples, PRECISION[server])


def best_peer(samples: Sequence[Sample], connections: int) -> tuple[str, float]:
    peers = [name for name in measured_servers(samples) if name not in OURS]
    return max(((name, speed(samples, name, connections).middle) for name in peers), key=lambda peer: peer[1])


def middle(samples: Sequence[Sample], kind: str, column: str, **wanted: Any) -> float:
    return spread(sample[column] for sample in pick(samples, kind, **wanted)).middle


# -- tables --------------------------------------------------------------------------------------------------------


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def table_of_speed(samples: Sequence[Sample]) -> str:
    connections = samples[0]["connections"]

    def cell(server: str, n: int) -> str:
        per_s, share = speed(samples, server, n), share_of_ceiling(samples, server, n)
        return f"{per_s.middle:.0f} ({per_s.low:.0f} to {per_s.high:.0f}) = {share:.2f}"

    rows = [[name_of(server), *(cell(server, n) for n in connections)] for server in measured_servers(samples)]
    ceilings = {precision: ceiling_per_s(samples, precision) for precision in ("fp32", "int8")}
    last = ["*bare loop, the ceiling*", *["fp32 {fp32:.0f}, int8 {int8:.0f}".format(**ceilings)] * len(connections)]
    return table(["requests/s, and share of the ceiling", *(plural(n) for n in connections)], [*rows, last])


def table_of_latency(samples: Sequence[Sample]) -> str:
    connections = samples[0]["connections"]

    def cell(server: str, n: int) -> str:
        wanted = {"server": server, "connections": n, "form": "jpeg"}
        return " / ".join(
            format_ms(middle(samples, "load", column, **wanted)) for column in ("p50_ms", "p95_ms", "p99_ms")
        )

    rows = [[name_of(server), *(cell(server, n) for n in connections)] for server in measured_servers(samples)]
    return table(["p50 / p95 / p99, ms", *(plural(n) for n in connections)], rows)


def table_of_cost(samples: Sequence[Sample]) -> str:
    def row(server: str) -> list[str]:
        busy = {"server": server, "connections": PNG_CONNECTIONS, "form": "jpeg"}
        return [
            name_of(server),
            f"{middle(samples, 'load', 'cpu_ms_per_request', **busy):.1f}",
            f"{middle(samples, 'visit', 'peak_rss_mib', server=server):.0f}",
            f"{100 * middle(samples, 'visit', 'idle_cores', server=server):.1f} %",
            f"{middle(samples, 'visit', 'start_s', server=server):.1f}",
            f"{speed(samples, server, PNG_CONNECTIONS, 'png').middle:.0f}",
            str(sum(s["bad_status"] + s["broken"] + s["timed_out"] for s in pick(samples, "load", server=server))),
        ]

    header = [
        "", "CPU ms per request", "peak memory, MiB", "idle, of one core", "start to first answer, s",
        f"PNG, requests/s at {PNG_CONNECTIONS}", "errors in all rounds",
    ]  # fmt: skip
    return table(header, map(row, measured_servers(samples)))


def table_of_overload(samples: Sequence[Sample]) -> str:
    def row(one: Sample) -> list[str]:
        others = [f"{n / one['sent']:.0%} {name_other(status)}" for status, n in one["others"].items()]
        if one["refused"]:
            words = f"{one['refused'] / one['sent']:.0%} refused in {format_ms(one['refusal_p99_ms'])} ms (p99)"
            others.insert(0, words)
        return [
            name_of(one["server"]),
            f"{one['offered_per_s']:.0f}",
            f"{one['goodput_per_s']:.0f} = {one['goodput_per_s'] / one['peak_per_s']:.2f}",
            f"{one['good_within_1_s'] / one['seconds'] / one['peak_per_s']:.2f}",
            format_ms(one["p99_ms"]) if one["good"] else "none answered",
            ", ".join(others) or "nobody else",
            f"{100 * one['generator_cpu_s'] / one['seconds']:.0f} %",
        ]

    header = [
        f"offered {OVERLOAD:g} times its peak", "offered/s", "goodput/s, of its peak", "within 1 s, of its peak",
        "p99 of the answered, ms", "the rest", "generator, of one core",
    ]  # fmt: skip
    return table(header, (row(one) for name in TITLES for one in pick(samples, "flood", server=name)))


def name_other(status: str) -> str:
    names = {"unanswered": f"without an answer in {PATIENCE_S:g} s", "cut": "cut off"}
    return names.get(status, f"answered {status}")


def table_of_mixture(samples: Sequence[Sample]) -> str:
    def row(one: Sample) -> list[str]:
        statuses = ", ".join(f"{n} x {status}" for status, n in one["bad_statuses"].items())
        failed = f"{one['good_failed']} of {one['good_sent']}"
        return [name_of(one["server"]), failed, f"{one['good_failed'] / one['good_sent']:.1%}", statuses]

    header = [f"one in eight damaged, {plural(MIX_CONNECTIONS)}", "good that failed", "share", "answers to the damaged"]
    return table(header, (row(one) for name in TITLES for one in pick(samples, "mixture", server=name)))


def table_of_targets(samples: Sequence[Sample], soak: Soak | None) -> str:
    """Only what was measured: servers can be left out."""
    servers = measured_servers(samples)
    peers = [name for name in servers if name not in OURS]
    rows: list[list[str]] = []
    if "tissue" in servers:
        rows += judge_shares(samples)
        rows += judge_against(peers, samples) if peers else []
        rows.append(judge_lone_request(samples))
        rows += [judge_int8(samples)] if "tissue_int8" in servers else []
        rows += judge_rest_and_start(samples)
    rows += judge_overload(samples)
    rows += judge_memory(soak) if soak is not None else []
    return table(["aim", "found", "met"], rows)


def judge(words: str, found: float, is_met: bool, form: str = "{:.2f}") -> list[str]:
    return [words, form.format(found), "yes" if is_met else "no"]


def judge_shares(samples: Sequence[Sample]) -> list[list[str]]:
    shares = {n: share_of_ceiling(samples, "tissue", n) for n in (8, 32)}
    return [judge(f"share of the ceiling at {n}, at least 0.90", share, share >= 0.90) for n, share in shares.items()]


def judge_against(peers: Sequence[str], samples: Sequence[Sample]) -> list[list[str]]:
    rows = []
    for n in samples[0]["connections"]:
        name, per_s = best_peer(samples, n)
        ratio = speed(samples, "tissue", n).middle / per_s
        least = 1.25 if n in (8, 32) else 1.0
        rows.append(judge(f"over the best peer ({TITLES[name]}) at {n}, at least {least:g}", ratio, ratio >= least))
    p99 = {
        name: middle(samples, "load", "p99_ms", server=name, connections=32, form="jpeg") for name in ["tissue", *peers]
    }
    lowest = min(peers, key=lambda name: p99[name])
    ratio = p99["tissue"] / p99[lowest]
    return [*rows, judge(f"p99 at 32, of the lowest of the peers' ({TITLES[lowest]}), below 1", ratio, ratio < 1)]


def judge_lone_request(samples: Sequence[Sample]) -> list[str]:
    bare = middle(samples, "ceiling", "lone_p99_ms", precision="fp32")
    ratio = middle(samples, "load", "p99_ms", server="tissue", connections=1, form="jpeg") / bare
    return judge("p99 at 1, of decode and bare call, at most 1.25", ratio, ratio <= 1.25)


def judge_int8(samples: Sequence[Sample]) -> list[str]:
    ratio = speed(samples, "tissue_int8", 32).middle / speed(samples, "tissue", 32).middle
    return judge("int8 over fp32 at 32, at least 1.3", ratio, ratio >= 1.3)


def judge_rest_and_start(samples: Sequence[Sample]) -> list[list[str]]:
    idle = middle(samples, "visit", "idle_cores", server="tissue")
    start_s = middle(samples, "visit", "start_s", server="tissue")
    return [
        judge("idle, share of one core, under 2 %", idle, idle < 0.02, "{:.1%}"),
        judge("start to first answer, at most 3 s", start_s, start_s <= 3, "{:.1f} s"),
    ]


def judge_overload(samples: Sequence[Sample]) -> list[list[str]]:
    rows = []
    for one in pick(samples, "flood", server="tissue"):
        share = one["goodput_per_s"] / one["peak_per_s"]
        rows.append(judge("goodput at twice the peak, of the peak, at least 0.9", share, share >= 0.9))
    for one in pick(samples, "mixture", server="tissue"):
        failed = one["good_failed"]
        rows.append(judge("good requests failed beside damaged ones, none", failed, not failed, "{:d}"))
    return rows


def judge_memory(soak: Soak) -> list[list[str]]:
    peak, grown = soak.peak_rss_mib, soak.second_half_growth_mib
    return [
        judge(f"peak memory after {soak.requests[-1]:,} requests, under 350 MiB", peak, peak < 350, "{:.0f} MiB"),
        judge("memory gained over their last half, under 2 MiB", grown, grown < 2, "{:+.1f} MiB"),
    ]


def describe_run(samples: Sequence[Sample]) -> str:
    setup = samples[0]
    others = spread(sample["other_cores"] for sample in pick(samples, "load"))
    skipped = ", ".join(TITLES[name] for name in setup["skipped"])
    tiles = "tiles of the user's own" if setup["own_tiles"] else "drawn tiles of 150 px"
    return (
        f"Machine: {setup['cores']} {setup['machine']} cores. Model: `{setup['model']}` "
        f"({setup['model_digest'][:12]}). Sent: {tiles}, JPEG of {setup['jpeg_bytes'] / 1000:.1f} kB and PNG of "
        f"{setup['png_bytes'] / 1000:.1f} kB on average. Each closed loop {setup['seconds']:g} s after a warm-up of "
        f"{WARM_UP_S} s, "
        f"{setup['rounds']} rounds of all servers in turn; median (lowest to highest round). Python {setup['python']}; "
        f"{describe_versions(setup)}. Left out: {skipped or 'nobody'}. "
        f"Something else on the machine took {others.middle:.2f} cores meanwhile (median; at most {others.high:.2f}).\n"
    )


def describe_versions(setup: Sample) -> str:
    own = {"litserve": "litserve", "mosec": "mosec", "bentoml": "bentoml", "ray": "ray", "fastapi_def": "fastapi"}
    versions = setup["versions"]
    runtime = sorted({packages["onnxruntime"] for packages in versions.values() if "onnxruntime" in packages})
    peers = [f"{package} {versions[name][package]}" for name, package in own.items() if name in versions]
    return ", ".join([f"tissue {setup['tissue']}", f"ONNX Runtime {' and '.join(runtime)}", *peers])


def name_of(server: str) -> str:
    return f"**{TITLES[server]}**" if server in OURS else TITLES[server]


def plural(connections: int) -> str:
    return f"{connections} connection{'s' if connections > 1 else ''}"


def format_ms(value: float) -> str:
    return f"{value:.1f}" if value < 10 else f"{value:.0f}"


# -- pictures ------------------------------------------------------------------------------------------------------


def draw_speed(samples: Sequence[Sample], path: Path) -> None:
    connections = samples[0]["connections"]
    figure = start_figure(8, 4.4, f"Requests/s, JPEG tiles, median of {samples[0]['rounds']} rounds")
    axes = figure.subplots()
    for precision, style in (("fp32", "-"), ("int8", "--")):
        axes.axhline(ceiling_per_s(samples, precision), color=INK, linewidth=0.8, linestyle=style)
        place = (connections[0], ceiling_per_s(samples, precision))
        axes.annotate(f"bare loop, {precision}", place, (0, 3), textcoords="offset points", fontsize=SMALL, color=INK)
    draw_servers(axes, samples, lambda server, n: speed(samples, server, n).middle)
    axes.set_ylim(0, None)
    axes.set_ylabel("requests/s", fontsize=NORMAL)
    finish(axes, connections, "connections")
    axes.legend(fontsize=SMALL, frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    save(figure, path)


def draw_latency(samples: Sequence[Sample], path: Path) -> None:
    connections = samples[0]["connections"]
    figure = start_figure(8, 4.4, f"99 of 100 requests are answered within, median of {samples[0]['rounds']} rounds")
    axes = figure.subplots()

    def p99(server: str, n: int) -> float:
        return middle(samples, "load", "p99_ms", server=server, connections=n, form="jpeg")

    draw_servers(axes, samples, p99)
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(ScalarFormatter())
    axes.set_ylabel("p99, ms", fontsize=NORMAL)
    finish(axes, connections, "connections")
    axes.legend(fontsize=SMALL, frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    save(figure, path)


def draw_servers(axes: Any, samples: Sequence[Sample], value: Callable[[str, int], float]) -> None:
    connections = samples[0]["connections"]
    for server in measured_servers(samples):
        colour, style, marker = STYLES[server]
        width = 2.0 if server in OURS else 1.2
        values = [value(server, n) for n in connections]
        axes.plot(
            connections, values, color=colour, linestyle=style, marker=marker, markersize=5, linewidth=width,
            label=TITLES[server],
        )  # fmt: skip


def draw_growth(samples: Sequence[Sample], path: Path) -> None:
    figure = start_figure(8, 6.4, "How the cost of tissue grows, one run, fp32, JPEG")
    (latency, queue), (size, workers) = figure.subplots(2, 2)

    x, p50, p99 = columns(samples, "connections", "connections", "p50_ms", "p99_ms")
    latency.plot(x, p99, color=ORANGE, marker="s", markersize=4, linewidth=1.3, label="p99")
    latency.plot(x, p50, color=BLUE, marker="o", markersize=4, linewidth=1.3, label="p50")
    latency.set_yscale("log")
    latency.yaxis.set_major_formatter(ScalarFormatter())
    latency.legend(fontsize=SMALL, frameon=False)
    label(latency, x, "connections", "latency, ms")

    x, memory = columns(samples, "queue", "waiting", "peak_rss_mib")
    queue.plot(x, memory, color=BLUE, marker="o", markersize=4, linewidth=1.3)
    queue.set_ylim(0, None)
    label(queue, x, "requests in hand", "peak memory, MiB")

    x, memory = columns(samples, "image size", "side_px", "peak_rss_mib")
    size.plot(x, memory, color=BLUE, marker="o", markersize=4, linewidth=1.3)
    size.set_ylim(0, None)
    label(size, x, "side of the image, px (8 connections)", "peak memory, MiB")

    x, per_s = columns(samples, "workers", "workers", "good_per_s")
    workers.bar([str(int(n)) for n in x], per_s, color=BLUE, width=0.5)
    workers.set_xlabel("worker processes (32 connections)", fontsize=NORMAL)
    workers.set_ylabel("requests/s", fontsize=NORMAL)
    soften(workers)
    save(figure, path)


def columns(samples: Sequence[Sample], measure: str, *names: str) -> list[list[float]]:
    return [list(column) for column in zip(*growth.points(samples, measure, *names), strict=True)]


def label(axes: Any, ticks: Sequence[float], x_name: str, y_name: str) -> None:
    axes.set_ylabel(y_name, fontsize=NORMAL)
    finish(axes, [int(tick) for tick in ticks], x_name)


def finish(axes: Any, ticks: Sequence[int], name: str) -> None:
    axes.set_xscale("log", base=2)
    axes.set_xticks(ticks, [str(tick) for tick in ticks])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlabel(name, fontsize=NORMAL)
    soften(axes)


# -- the page ------------------------------------------------------------------------------------------------------


def write(samples: Sequence[Sample], soak: Soak | None, page: Path) -> None:
    """Fills the page between its two marks; what people wrote around them stays. Makes the page where there is none."""
    if not samples:
        raise ValueError("there are no results yet; `python -m benchmarks run` makes them")
    text = page.read_text() if page.exists() else NEW_PAGE
    if not FIGURES.search(text):
        raise ValueError(f"{page} has no lines <!-- figures --> and <!-- end of figures --> to write between")
    images = page.parent / "images"
    draw_speed(samples, images / "benchmark-speed.png")
    draw_latency(samples, images / "benchmark-latency.png")
    parts = [
        describe_run(samples),
        "### Aims\n",
        table_of_targets(samples, soak),
        "### Requests per second\n",
        "![Requests/s against connections](images/benchmark-speed.png)\n",
        table_of_speed(samples),
        "### Latency\n",
        "![p99 against connections](images/benchmark-latency.png)\n",
        table_of_latency(samples),
        "### What it costs\n",
        table_of_cost(samples),
        "### Twice as much as it can answer\n",
        table_of_overload(samples),
        "### Damaged images among good ones\n",
        table_of_mixture(samples),
    ]
    if pick(samples, "growth"):
        draw_growth(samples, images / "benchmark-growth.png")
        parts += ["### How cost grows\n", "![Growth of cost](images/benchmark-growth.png)\n"]
    body = "\n".join(parts)
    page.write_text(FIGURES.sub(lambda marks: f"{marks[1]}\n{body}\n{marks[2]}", text))
