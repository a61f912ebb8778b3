import contextlib
import io
import json
import logging
import os
import sys

import pytest

from app.logs import ACCESS, Gathered, JsonLines, TextLines, configure


def make_record(**extras):
    record = logging.makeLogRecord({"msg": "request", "levelname": "INFO", "name": "tissue"})
    vars(record).update(extras)
    return record


def test_json_lines_hold_the_event_and_its_fields():
    event = json.loads(JsonLines().format(make_record(status=200, route="/predict")))
    assert (event["event"], event["level"], event["status"], event["route"]) == ("request", "info", 200, "/predict")
    assert event["time"].endswith("+00:00") and event["pid"]


def test_text_lines_hold_the_same():
    line = TextLines().format(make_record(status=200, route="/predict"))
    assert line.endswith("INFO    request status=200 route=/predict")


@pytest.mark.parametrize("formatter", [JsonLines(), TextLines()])
def test_errors_keep_their_traceback_on_one_event(formatter):
    try:
        raise KeyError("cause")
    except KeyError:
        line = formatter.format(make_record(exc_info=sys.exc_info()))
    assert "KeyError: 'cause'" in line
    assert isinstance(formatter, TextLines) or "\n" not in line


def test_configured_once_a_line_an_event(capsys):
    before = logging.getLogger().handlers[:]
    try:
        configure("text")
        configure("json")
        logging.getLogger("tissue").info("hello", extra={"n": 1})
    finally:
        logging.getLogger().handlers[:] = before
        logging.getLogger().setLevel(logging.WARNING)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and json.loads(lines[0])["n"] == 1


def test_lines_of_requests_are_written_together_and_everything_else_at_once():
    writes = []

    class Stream(io.StringIO):
        def write(self, text):
            writes.append(text)
            return len(text)

    handler = Gathered(Stream())
    handler.setFormatter(logging.Formatter("%(msg)s"))

    def log(name, level, text):
        handler.handle(logging.makeLogRecord({"name": name, "levelno": level, "msg": text}))

    log(ACCESS, logging.INFO, "first")
    log(ACCESS, logging.INFO, "second")
    assert writes == []
    handler.flush()
    handler.flush()
    assert writes == ["first\nsecond\n"]
    log(ACCESS, logging.INFO, "third")
    log("tissue", logging.INFO, "stopping")
    log(ACCESS, logging.ERROR, "failed")
    assert writes[1:] == ["third\nstopping\n", "failed\n"]


def test_lines_that_nobody_can_take_stop_nothing():
    handled = 0
    reading, writing = os.pipe()
    os.close(reading)
    with contextlib.suppress(BrokenPipeError), open(writing, "w") as stream:  # closing it tries once more
        handler = Gathered(stream)
        for _ in range(2):
            handler.handle(logging.makeLogRecord({"name": "tissue", "levelno": logging.INFO, "msg": "ready"}))
            handled += 1
    assert handled == 2
