"""HTTP by hand, for what no client would send."""

import socket

from tests.app.conftest import PATIENCE_S, Process


def connect(process: Process) -> socket.socket:
    host, _, port = process.url.removeprefix("http://").rpartition(":")
    return socket.create_connection((host, int(port)), timeout=PATIENCE_S)


def request_head(path: str, *headers: str) -> bytes:
    return "\r\n".join([f"POST {path} HTTP/1.1", "Host: test", "Content-Type: image/png", *headers, "", ""]).encode()
