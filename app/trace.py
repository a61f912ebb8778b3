"""What is noted about a request while it is answered, for its headers, the log and the metrics."""

import random
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

STAGES = ("upload", "decode", "queue", "infer", "render")  # in the order in which a request goes through them

_SANE_ID = re.compile(r"[A-Za-z0-9._:/+=@-]{1,128}")


@dataclass(slots=True)
class Trace:
    request_id: str
    started_at: float = field(default_factory=time.monotonic)
    stages_s: dict[str, float] = field(default_factory=dict)  # seconds in each of STAGES
    problem: str | None = None  # code of the problem that was answered

    def add(self, stage: str, seconds: float) -> None:
        self.stages_s[stage] = self.stages_s.get(stage, 0) + seconds

    @contextmanager
    def measure(self, stage: str) -> Iterator[None]:
        started_at = time.monotonic()
        try:
            yield
        finally:
            self.add(stage, time.monotonic() - started_at)

    def elapsed_s(self) -> float:
        return time.monotonic() - self.started_at

    def write_server_timing(self) -> str:
        spans = [(stage, self.stages_s[stage]) for stage in STAGES if stage in self.stages_s]
        spans.append(("total", self.elapsed_s()))
        return ", ".join(f"{stage};dur={seconds * 1000:.2f}" for stage, seconds in spans)


def choose_request_id(offered: str | None) -> str:
    """The client's own, if it can stand in a header and a log line; else a new one."""
    return offered if offered and _SANE_ID.fullmatch(offered) else f"{random.getrandbits(128):032x}"
