"""A worker's own time: the monotonic clock without the time in which it stood still for others.

The server stops workers while another one measures (`executors.turns`). Before it lets one go on, it writes the sum of
all its stops into the worker's private folder. A worker that waits for its own turn holds the clock by itself.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_NAME = "paused_s"
_FRESH_S = 0.5  # how long what was read is taken for true


def write_paused_s(directory: Path, paused_s: float) -> None:
    """The server's side: for how long the worker of this folder stood still in all. Raises OSError."""
    partial = directory / f"{_NAME}.partial"
    partial.unlink(missing_ok=True)
    # The folder is the worker's: nothing that it put there is followed or written to. It may be another user.
    descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    with os.fdopen(descriptor, "w", encoding="ascii") as file:
        os.fchmod(descriptor, 0o644)
        file.write(repr(paused_s))
    partial.rename(directory / _NAME)


class OwnClock:
    """Seconds of a worker's own time. `directory`: its private folder."""

    def __init__(self, directory: Path) -> None:
        self._path = directory / _NAME
        self._read_at_s = float("-inf")
        self._paused_s = 0.0
        self._held_s = 0.0

    def __call__(self) -> float:
        now = time.monotonic()
        if now - self._read_at_s > _FRESH_S:
            self._read_at_s = now
            self._paused_s = self._read()
        return now - self._paused_s - self._held_s

    @contextmanager
    def held(self) -> Iterator[None]:
        """While this lasts, no time passes."""
        self._read_at_s = float("-inf")
        before_s = self()
        try:
            yield
        finally:
            self._read_at_s = float("-inf")
            self._held_s += self() - before_s

    def _read(self) -> float:
        try:
            return float(self._path.read_text("ascii"))
        except (OSError, ValueError):
            return self._paused_s
