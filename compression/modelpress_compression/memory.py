"""What one run has found out, kept for the next: files in a folder, each named by a digest of what it stands for.

    {key}.zip    facts.json, and the files that belong to it; stored, with checksums

`key_of` makes the key from everything that the facts depend on, so that nothing ever goes stale: what was made by other
code, from other data or on another machine has another key and is not found. An entry appears by `rename`, whole or not
at all; one that is damaged is removed and counts as unknown. When the folder grows beyond its limit, what was not
asked for the longest goes first. A full disk, or a folder that cannot be written, costs the memory and nothing else.

Whoever can write to the folder decides what is remembered: it must belong to whoever reads it.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
import zipfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from modelpress_compression.archive import Archive
from modelpress_compression.errors import CompressionError

DEFAULT_LIMIT_BYTES = 1024**3  # 1 GiB
MAX_ENTRIES = 10_000  # a search leaves some dozens
MAX_FACTS_BYTES = 64 * 1024**2  # 64 MiB
# Of the limit: a larger entry would drive out all others.
_LARGEST_SHARE = 0.25
SUFFIX = ".zip"
_FACTS = "facts.json"
_WHAT, _WRITERS = "The remembered entry", "modelpress"
_DAMAGED = (CompressionError, OSError, ValueError, KeyError)


def key_of(*parts: object) -> str:
    """A digest of the parts, which are what JSON can hold. 64 hex digits."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, ensure_ascii=True).encode()).hexdigest()


@dataclass(frozen=True)
class Entry:
    """`facts`: what was found out. `path`: of the file that holds it and what belongs to it."""

    facts: Mapping[str, Any]
    path: Path

    def extract(self, folder: Path) -> bool:
        """Writes the files of the entry into the folder; False: it is damaged, or gone by now."""
        try:
            with Archive.open(self.path, _WHAT, writers=_WRITERS) as archive:
                folder.mkdir(parents=True, exist_ok=True)
                for member in archive.members:
                    if member.name == _FACTS:
                        continue
                    with (folder / _plain(member.name)).open("xb") as target:
                        for piece in archive.pieces(member):
                            target.write(piece)
        except _DAMAGED:
            return False
        return True


@dataclass(frozen=True)
class Memory:
    """Entries in `folder`, of `limit_bytes` together at most. `earlier`: a folder of more, only read."""

    folder: Path
    limit_bytes: int = DEFAULT_LIMIT_BYTES
    earlier: Path | None = None

    def get(self, key: str) -> Entry | None:
        """What is remembered under the key; None: nothing is."""
        name = f"{key}{SUFFIX}"
        entry = _read(self.folder / name, own=True)
        if entry is None and self.earlier is not None:
            entry = _read(self.earlier / name, own=False)
        return entry

    def put(self, key: str, facts: Mapping[str, Any], files: Iterable[Path] = ()) -> None:
        """Remembers the facts, which are what JSON can hold, and the files by their names.

        Nothing is remembered where that would take too much room, or cannot be written.
        """
        files = list(files)
        with contextlib.suppress(OSError):
            text = json.dumps(facts)
            size_bytes = len(text) + sum(path.stat().st_size for path in files)
            if len(text) > MAX_FACTS_BYTES or size_bytes > self.limit_bytes * _LARGEST_SHARE:
                return
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            shrink(self.folder, self.limit_bytes - size_bytes)
            self._write(key, text, files)

    def _write(self, key: str, text: str, files: Iterable[Path]) -> None:
        descriptor, name = tempfile.mkstemp(prefix=f"{key[:16]}-", suffix=".partial", dir=self.folder)
        try:
            with os.fdopen(descriptor, "wb") as file, zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
                archive.writestr(_FACTS, text)
                for path in files:
                    archive.write(path, path.name)
            Path(name).replace(self.folder / f"{key}{SUFFIX}")
        except BaseException:
            Path(name).unlink(missing_ok=True)
            raise


def _read(path: Path, *, own: bool) -> Entry | None:
    """The entry in a file; None: there is none. `own`: it is marked as asked for, and goes if it is damaged."""
    try:
        with Archive.open(path, _WHAT, writers=_WRITERS) as archive:
            first = archive.members[0]
            facts = json.loads(archive.read(first, MAX_FACTS_BYTES)) if first.name == _FACTS else None
    except FileNotFoundError:
        return None
    except (*_DAMAGED, IndexError, RecursionError):
        facts = None
    # Neither is worth an error: a confined process may not set times, say.
    with contextlib.suppress(OSError):
        if own and isinstance(facts, dict):
            os.utime(path)
        elif own:
            path.unlink()
    return Entry(facts, path) if isinstance(facts, dict) else None


def shrink(folder: Path, limit_bytes: int) -> None:
    """Removes what was not asked for the longest until files below the folder take no more than `limit_bytes`, and are
    no more than `MAX_ENTRIES`.

    Raises OSError.
    """
    found = sorted(_files(folder), key=lambda item: item[1].st_mtime, reverse=True)
    total_bytes = 0
    for number, (path, status) in enumerate(found):
        total_bytes += status.st_size
        if total_bytes > limit_bytes or number >= MAX_ENTRIES:
            path.unlink(missing_ok=True)


def kept_bytes(folder: Path) -> int:
    """The sizes of all files below the folder."""
    return sum(status.st_size for _, status in _files(folder))


def _files(folder: Path) -> Iterable[tuple[Path, os.stat_result]]:
    for path in folder.rglob("*"):
        with contextlib.suppress(FileNotFoundError):
            status = path.lstat()
            if not path.is_dir():
                yield path, status


def _plain(name: str) -> str:
    """The name of a file in a folder, which it must not lead out of. Raises ValueError."""
    if name in ("", ".", "..") or "/" in name or "\0" in name:
        raise ValueError(f"{name!r} is no plain name")
    return name
