"""Log lines for people (text) or machines (JSON), one an event, on stderr. Never a file name, never a picture."""

import json
import logging
import sys
from contextlib import nullcontext, suppress
from datetime import UTC, datetime
from typing import Literal, TextIO

ACCESS = "tissue.access"  # the logger with a line for every request
MOST_GATHERED = 1000  # lines

# What logging itself puts on every record; all else was passed as `extra` and is part of the event.
_OWN = set(vars(logging.makeLogRecord({}))) | {"message", "asctime", "color_message"}


class JsonLines(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        event = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "event": record.getMessage(),
            "pid": record.process,
            **read_extras(record),
        }
        if record.exc_info:
            event["trace"] = self.formatException(record.exc_info)
        return json.dumps(event, default=str)


class TextLines(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        time = datetime.fromtimestamp(record.created).isoformat(" ", "milliseconds")
        extras = "".join(f" {name}={value}" for name, value in read_extras(record).items())
        line = f"{time} {record.levelname:<7} {record.getMessage()}{extras}"
        return f"{line}\n{self.formatException(record.exc_info)}" if record.exc_info else line


class Gathered(logging.StreamHandler[TextIO]):
    """Writes access lines in batches: on `flush`, or with the first other line.

    Each write lets other threads have the interpreter, and while model calls run it comes back late; formatting many at
    once also keeps that code in the CPU's caches.
    """

    def __init__(self, stream: TextIO) -> None:
        super().__init__(stream)
        self._records: list[logging.LogRecord] = []

    def emit(self, record: logging.LogRecord) -> None:
        self._records.append(record)
        if record.name != ACCESS or record.levelno >= logging.WARNING or len(self._records) >= MOST_GATHERED:
            self.flush()

    def flush(self) -> None:
        with self.lock or nullcontext():
            records, self._records = self._records, []
            if records:
                lines = "".join(self.format(record) + self.terminator for record in records)
                with suppress(OSError):  # whoever read them has gone, or the disk is full: no reason to stop answering
                    self.stream.write(lines)
                    self.stream.flush()


def configure(form: Literal["json", "text"]) -> None:
    handler = Gathered(sys.stderr)
    handler.setFormatter(JsonLines() if form == "json" else TextLines())
    logging.basicConfig(level=logging.INFO, handlers=[handler], force=True)
    logging.getLogger("uvicorn.error").setLevel(logging.WARNING)  # its start and stop lines repeat ours


def write_gathered() -> None:
    for handler in logging.getLogger().handlers:
        handler.flush()


def read_extras(record: logging.LogRecord) -> dict[str, object]:
    return {name: value for name, value in vars(record).items() if name not in _OWN}
