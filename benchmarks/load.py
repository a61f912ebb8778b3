"""Closed loop: `wrk` keeps a number of connections busy, each sending its next tile when it has its answer."""

import json
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.servers import Body

SCRIPT = Path(__file__).with_name("wrk.lua")
PATIENCE_S = 30


class WrkFailed(RuntimeError):
    pass


@dataclass(frozen=True)
class Load:
    requests: int  # answered, whatever the answer
    seconds: float
    bad_status: int  # not 2xx or 3xx
    broken: int  # connections refused or cut
    timed_out: int
    p50_ms: float
    p95_ms: float
    p99_ms: float
    max_ms: float

    @property
    def good_per_s(self) -> float:
        return (self.requests - self.bad_status) / self.seconds

    @property
    def errors(self) -> int:
        return self.bad_status + self.broken + self.timed_out


def drive(address: str, bodies: Sequence[Body], connections: int, seconds: float) -> Load:
    """With one thread of wrk, which takes little from the server and is enough for some 10,000 requests/s."""
    wrk = shutil.which("wrk")
    if wrk is None:
        raise WrkFailed("wrk is not installed; Debian and Ubuntu have it: apt-get install wrk")
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder) / f"{number}.body" for number in range(len(bodies))]
        for file, body in zip(files, bodies, strict=True):
            file.write_bytes(body.data)
        command = [
            wrk, "--threads", "1", "--connections", str(connections), "--duration", f"{max(1, round(seconds))}s",
            "--timeout", f"{PATIENCE_S}s", "--script", str(SCRIPT), address,
            "--", bodies[0].content_type, *map(str, files),
        ]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True)
    return parse(done.stdout, done.stderr)


def parse(stdout: str, stderr: str = "") -> Load:
    """wrk's own words, then the line of JSON that the script writes."""
    line = stdout.rstrip().rpartition("\n")[2]
    try:
        return Load(**json.loads(line))
    except (ValueError, TypeError) as error:
        raise WrkFailed(f"wrk ended without figures: {(stderr or stdout).strip()[-300:]}") from error
