"""Exits with 0 if the service in this container can answer. A bare socket, since it is asked every few seconds."""

import os
import socket
import sys

PORT = int(os.environ.get("TISSUE_PORT", "8000"))

with socket.create_connection(("127.0.0.1", PORT), timeout=5.5) as connection:
    connection.sendall(b"GET /readyz HTTP/1.0\r\n\r\n")
    sys.exit(b" 200 " not in connection.recv(64))
