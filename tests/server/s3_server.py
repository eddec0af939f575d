"""A server that speaks S3 (moto), as a process on 127.0.0.1."""

from __future__ import annotations

import importlib.util
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager

START_S = 60.0
BUCKET = "models"


class NotHereError(Exception):
    """There is no such server; the message says what is missing."""


@contextmanager
def s3_server() -> Iterator[str]:
    """Runs it, with an empty bucket, while it lasts; its endpoint. Raises NotHereError."""
    for name in ("moto", "flask", "flask_cors", "obstore"):
        if importlib.util.find_spec(name) is None:
            raise NotHereError(f"no {name}: pip install 'modelpress[test]'")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    endpoint = f"http://127.0.0.1:{port}"
    command = [sys.executable, "-W", "ignore", "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        _wait(port, server)
        with urllib.request.urlopen(urllib.request.Request(f"{endpoint}/{BUCKET}", method="PUT")) as answer:
            assert answer.status == 200
        yield endpoint
    finally:
        server.kill()
        server.wait()


def environment(endpoint: str) -> dict[str, str]:
    """What a process needs to speak to it."""
    return {
        "AWS_ENDPOINT_URL": endpoint,
        "AWS_ACCESS_KEY_ID": "tester",
        "AWS_SECRET_ACCESS_KEY": "not-so-secret-key",
        "AWS_REGION": "us-east-1",
    }


def _wait(port: int, server: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline and server.poll() is None:
        try:
            socket.create_connection(("127.0.0.1", port)).close()
            return
        except OSError:
            time.sleep(0.05)
    raise AssertionError("moto's server did not start")
