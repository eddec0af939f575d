"""Workers as users of their own, where the server may change users (root with the usual capabilities of a container).

Landlock decides which files a worker opens, not what it learns of the others by asking for their size or time. A user
of its own, without rights on the server's folders, closes that as well:

    data folder, work/     the server's; mode 0710 for the workers' group: may be passed through, not listed
    blobs/, uploads/ ...   the server's; mode 0700: nothing in them exists for a worker
    work/{task}/...        the folders are the worker's own; the model's files stay the server's, readable

Each worker has another user than those beside it, so that two tenants' tasks are apart in the same way.
"""

from __future__ import annotations

import itertools
import os
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

COUNT = 500
# chown, dac_override, fowner, kill, setgid, setuid: to give folders away, look into them, change users, end processes.
_NEEDED = (0, 1, 3, 5, 6, 7)


@dataclass(frozen=True)
class WorkerUser:
    """A user id, and the group that all workers share."""

    uid: int
    gid: int

    @classmethod
    def parse(cls, text: str) -> WorkerUser | None:
        """The inverse of `str`; None: the text is empty."""
        uid, _, gid = text.partition(":")
        return cls(int(uid), int(gid)) if text else None

    def __str__(self) -> str:
        return f"{self.uid}:{self.gid}"

    def own(self, folder: Path) -> None:
        """Gives a folder to this user."""
        os.chown(folder, self.uid, self.gid)

    def hand_over(self, root: Path, paths: Iterable[Path]) -> None:
        """Lets this user reach what a task reads and writes: files and folders somewhere below `root`."""
        for path in paths:
            for parent in path.relative_to(root).parents:
                if parent != Path():
                    let_through(root / parent, self.gid)
            for folder in _folders(path):
                self.own(folder)
            for file in _files(path):
                if not file.stat().st_mode & 0o004:
                    file.chmod(0o444)


class WorkerUsers:
    """Users for the workers of one server, in turn. `first`: the first user id; also the id of their group."""

    def __init__(self, first: int) -> None:
        self._gid = first
        self._uids = itertools.cycle(range(first + 1, first + COUNT))

    def next(self) -> WorkerUser:
        """A user that no worker has had for long."""
        return WorkerUser(next(self._uids), self._gid)

    def open(self, root: Path) -> None:
        """Lets the workers through to `root`, which lies in the data folder."""
        for folder in (root.parent, root):
            let_through(folder, self._gid)

    def close(self, root: Path) -> None:
        """Takes back what `open` did: there will be no such workers."""
        for folder in (root.parent, root):
            folder.chmod(0o700)


def may_change_user() -> bool:
    """Whether this process may run others as users of its choice."""
    status = Path("/proc/self/status").read_text("utf-8", "replace").splitlines()
    effective = next((int(line.split()[1], 16) for line in status if line.startswith("CapEff:")), 0)
    return os.geteuid() == 0 and all(effective >> capability & 1 for capability in _NEEDED)


def barrier(user: WorkerUser, data: Path) -> str:
    """What keeps a user from running this Python, or from reaching the data folder; empty: no folder's mode does."""
    installation = [Path(path) for path in (sys.executable, sys.base_prefix, os.__file__, *sys.path)]
    for path in (*installation, data):
        for folder in reversed(path.resolve().parents):
            if not _may(user, folder, 0o1):
                lies = "the data folder lies" if path == data else f"Python needs {path.resolve()}, which lies"
                mode = f"{folder.stat().st_mode & 0o7777:04o}"
                return (
                    f"others may not pass through {folder} (mode {mode}), and {lies} below it. For workers with users "
                    "of their own put it elsewhere, such as below /opt or /var/lib"
                )
    return ""


def _may(user: WorkerUser, path: Path, right: int) -> bool:
    """Whether the mode of a path gives a right, 1 to pass through it; a path that is not there does."""
    try:
        found = path.stat()
    except OSError:
        return True
    shift = 6 if found.st_uid == user.uid else 3 if found.st_gid == user.gid else 0
    return bool(found.st_mode >> shift & right)


def let_through(folder: Path, gid: int) -> None:
    """The group may pass through a folder of the server's, and not list it."""
    os.chown(folder, -1, gid)
    folder.chmod(0o710)


def _folders(path: Path) -> Iterator[Path]:
    if path.is_dir():
        yield path
        yield from (found for found in path.rglob("*") if found.is_dir() and not found.is_symlink())


def _files(path: Path) -> Iterator[Path]:
    if path.is_file():
        yield path
    yield from (found for found in path.rglob("*") if found.is_file() and not found.is_symlink())
