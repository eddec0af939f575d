"""Which sandbox level this kernel gives: confines itself as a worker would, and tries to break out.

    python -m modelpress_server.executors.sandbox_probe MODE PARENT_PID DIRECTORY      prints the level

DIRECTORY is an empty folder; the caller removes it.
"""

from __future__ import annotations

import socket
import sys
from pathlib import Path

from modelpress_server.executors.sandbox import LEVEL_ALWAYS, LEVEL_FILES_AND_NETWORK, Sandbox


def probe(mode: str, parent_pid: int, directory: Path) -> int:
    """The level that was reached and holds; this process stays confined."""
    secret, own = directory / "secret", directory / "own"
    secret.write_text("readable", "ascii")
    own.mkdir()
    sandbox = Sandbox(mode)
    sandbox.enter(parent_pid, [directory])
    sandbox.close_calls()
    sandbox.narrow([], [own])
    if sandbox.level < LEVEL_FILES_AND_NETWORK or _can_read(secret) or _can_connect():
        return LEVEL_ALWAYS
    return LEVEL_FILES_AND_NETWORK


def _can_read(path: Path) -> bool:
    try:
        path.read_bytes()
    except OSError:
        return False
    return True


def _can_connect() -> bool:
    try:
        socket.socket(socket.AF_INET).close()
    except OSError:
        return False
    return True


if __name__ == "__main__":
    print(probe(sys.argv[1], int(sys.argv[2]), Path(sys.argv[3])), flush=True)  # the answer
