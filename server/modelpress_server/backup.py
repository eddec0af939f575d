"""Copies a data folder while its server runs, and makes one of a copy: `compress-server backup` and `restore`.

    TARGET/modelpress.db    the records as they were at one moment
    TARGET/blobs/ab/...     every file that they name, compared with its digest on the way
    TARGET/tokens.json      tokens, if there are any

Records come first: a file that they name is there, or was deleted meanwhile; then they are taken once more. The copy of
the records gets its name last, so that a backup that was cut short leaves the one before it. A file that an earlier
backup has is not copied again, and one that no record names any more goes. Unfinished uploads, working folders and
findings are left out: clients send the first again, and the others are made again.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import sqlite3
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path

from modelpress_protos.v1 import upload_service_pb2

from modelpress_server.config import TOKENS_NAME

DATABASE_NAME = "modelpress.db"
BLOCK_BYTES = 1024 * 1024
# Between the look at the records and the copy of a file, the file may go: then everything is looked at again.
ROUNDS = 3

OnProgress = Callable[[int], None]


@dataclass
class Copied:
    """What a backup or a restore did. `damaged`, `missing`: names of files that could not be copied as they were."""

    blobs: int = 0
    size_bytes: int = 0
    kept: int = 0  # were there already
    removed: int = 0
    damaged: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)

    @property
    def whole(self) -> bool:
        """Whether everything that the records name is there."""
        return not (self.damaged or self.missing)


def back_up(data_dir: Path, target: Path, on_progress: OnProgress) -> Copied:
    """Copies what a data folder holds into `target`. `on_progress` is told of bytes. Raises OSError, sqlite3.Error."""
    _make_folder(target)
    taken, copied = target / f"{DATABASE_NAME}.new", Copied()
    for _ in range(ROUNDS):
        _copy_records(data_dir / DATABASE_NAME, taken)
        copied.damaged, copied.missing = [], []
        wanted = _files_of(taken)
        _copy_blobs(data_dir, target, wanted, copied, on_progress)
        if not copied.missing:
            break
    tokens = data_dir / TOKENS_NAME
    if tokens.exists():
        _copy_private(tokens, target / TOKENS_NAME)
    else:
        (target / TOKENS_NAME).unlink(missing_ok=True)
    taken.replace(target / DATABASE_NAME)
    _sync(target)
    copied.removed = _remove_others(target, wanted)
    return copied


def restore(source: Path, data_dir: Path, on_progress: OnProgress) -> Copied:
    """Makes the data folder of a backup; `data_dir` is one's own, and empty. Raises OSError, sqlite3.Error."""
    copied, taken = Copied(), data_dir / f"{DATABASE_NAME}.new"
    _copy_private(source / DATABASE_NAME, taken)
    _copy_blobs(source, data_dir, _files_of(taken), copied, on_progress)
    if (source / TOKENS_NAME).exists():
        _copy_private(source / TOKENS_NAME, data_dir / TOKENS_NAME)
    # The server starts on what has this name: it is whole by now.
    taken.replace(data_dir / DATABASE_NAME)
    _sync(data_dir)
    return copied


def total_bytes(database: Path) -> int:
    """How much there is to copy at most."""
    return sum(_files_of(database).values())


def _copy_records(source: Path, target: Path) -> None:
    target.unlink(missing_ok=True)
    target.touch(mode=0o600)
    with closing(_reading(source)) as records, closing(sqlite3.connect(target)) as copy:
        # SQLite's own way: one moment of a database that is being written.
        records.backup(copy)
        copy.execute("PRAGMA journal_mode=DELETE")  # one file, without a log beside it
        copy.execute("DELETE FROM uploads WHERE state = ?", (int(upload_service_pb2.Upload.STATE_ACTIVE),))
        copy.commit()


def _files_of(database: Path) -> Mapping[str, int]:
    """Size by name of every file that the records name."""
    with closing(_reading(database)) as records:
        rows = records.execute("SELECT DISTINCT sha256, size_bytes FROM project_blobs").fetchall()
    return {sha256.hex(): size_bytes for sha256, size_bytes in rows}


def _reading(database: Path) -> sqlite3.Connection:
    return sqlite3.connect(f"{database.absolute().as_uri()}?mode=ro", uri=True)


def _copy_blobs(source: Path, target: Path, wanted: Mapping[str, int], copied: Copied, tell: OnProgress) -> None:
    for name, size_bytes in sorted(wanted.items()):
        place = _place_of(target, name)
        if place.exists() and place.stat().st_size == size_bytes:
            tell(size_bytes)
            continue
        try:
            whole = _copy_blob(_place_of(source, name), place, name, tell)
        except FileNotFoundError:
            copied.missing.append(name)
            continue
        if whole:
            copied.blobs += 1
            copied.size_bytes += size_bytes
        else:
            copied.damaged.append(name)
    copied.kept = len(wanted) - copied.blobs - len(copied.damaged) - len(copied.missing)


def _copy_blob(source: Path, target: Path, name: str, tell: OnProgress) -> bool:
    """Whether the bytes are those of the name; only then they appear. Raises FileNotFoundError."""
    sha256 = hashlib.sha256()
    with source.open("rb") as file:
        target.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        temporary = target.with_suffix(".new")
        with temporary.open("wb") as copy:
            while block := file.read(BLOCK_BYTES):
                sha256.update(block)
                copy.write(block)
                tell(len(block))
            copy.flush()
            os.fsync(copy.fileno())
    if sha256.hexdigest() != name:
        temporary.unlink()
        return False
    temporary.chmod(0o444)
    temporary.replace(target)
    return True


def _copy_private(source: Path, target: Path) -> None:
    temporary = target.with_suffix(".tmp")
    temporary.unlink(missing_ok=True)
    temporary.touch(mode=0o600)
    shutil.copyfile(source, temporary)
    temporary.replace(target)


def _remove_others(target: Path, wanted: Mapping[str, int]) -> int:
    removed = 0
    for path in _blob_files(target):
        if path.name not in wanted:
            path.unlink()
            removed += 1
    return removed


def _blob_files(folder: Path) -> Iterator[Path]:
    yield from (folder / "blobs").glob("??/*")


def _place_of(folder: Path, name: str) -> Path:
    return folder / "blobs" / name[:2] / name


def _make_folder(folder: Path) -> None:
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    if not (folder / DATABASE_NAME).exists() and any(
        path.name not in ("blobs", TOKENS_NAME, f"{DATABASE_NAME}.new") for path in folder.iterdir()
    ):
        raise FileExistsError(
            f"{folder} holds something else than a backup. Name an empty folder, or an earlier backup"
        )


def _sync(folder: Path) -> None:
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
