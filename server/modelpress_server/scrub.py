"""Reads everything that a data folder holds and compares it with its digests: `compress-server check`.

May run beside a server: files are only read, and a damaged blob is set aside by one rename.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from modelpress_server.stores.database import Records, read_records

BLOCK_BYTES = 1024 * 1024


@dataclass
class Found:
    """What is wrong, as names of blobs or texts for people; sizes in bytes."""

    blobs: int = 0
    size_bytes: int = 0
    damaged: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    database: list[str] = field(default_factory=list)
    uploads: list[str] = field(default_factory=list)

    @property
    def sound(self) -> bool:
        """Whether everything is as it was stored."""
        return not (self.damaged or self.missing or self.database or self.uploads)


class Scrub:
    """One pass over a data folder. `total_bytes`: how much there is to read."""

    def __init__(self, data_dir: Path) -> None:
        self._data_dir = data_dir
        self._files = sorted(path for path in (data_dir / "blobs").glob("??/*") if path.is_file())
        self.total_bytes = sum(_size(path) for path in self._files)

    def run(self, *, set_aside: bool, on_progress: Callable[[int], None]) -> Found:
        """Checks; `on_progress` is told how many bytes were read since the last time. Raises OSError."""
        found = Found()
        records = read_records(self._data_dir / "modelpress.db")
        found.database = list(records.faults)
        for path in self._files:
            whole = self._check(path, records, on_progress)
            if whole is None:
                continue
            found.blobs += 1
            found.size_bytes += _size(path)
            if not whole:
                found.damaged.append(path.name)
                if set_aside:
                    self._set_aside(path)
        # What was deleted meanwhile is in the records no longer.
        for name in read_records(self._data_dir / "modelpress.db").blobs:
            if not (self._data_dir / "blobs" / name[:2] / name).exists() and name not in found.damaged:
                found.missing.append(name)
        found.uploads = list(self._short_uploads(records))
        return found

    def _check(self, path: Path, records: Records, on_progress: Callable[[int], None]) -> bool | None:
        """Whether a blob is whole; None: it was deleted meanwhile."""
        sha256, size_bytes = hashlib.sha256(), 0
        try:
            with path.open("rb") as file:
                while block := file.read(BLOCK_BYTES):
                    sha256.update(block)
                    size_bytes += len(block)
                    on_progress(len(block))
        except FileNotFoundError:
            return None
        except OSError:
            return False
        return sha256.hexdigest() == path.name and records.blobs.get(path.name, size_bytes) == size_bytes

    def _set_aside(self, path: Path) -> None:
        folder = self._data_dir / "quarantine"
        folder.mkdir(mode=0o700, exist_ok=True)
        path.rename(folder / path.name)

    def _short_uploads(self, records: Records) -> Iterator[str]:
        for upload_id, committed_size in records.uploads.items():
            path = self._data_dir / "uploads" / upload_id
            if committed_size and _size(path) < committed_size:
                yield f"upload {upload_id}: {_size(path)} of {committed_size} acknowledged bytes"


def _size(path: Path) -> int:
    try:
        return os.lstat(path).st_size
    except OSError:
        return 0
