"""What jobs have found out about a model and its data, kept for later jobs of the same project.

    findings/{project}/{model}-{data}/{key}.zip      written by the engine (`modelpress_compression.memory`)

A worker is given the entries for its own model and data, to read, and leaves new ones in a folder of its task. The
server takes from there plain files of the expected names alone, so that no worker ever writes where another one reads.
What a worker leaves may be wrong, as whatever it was made to run may have written it: it reaches jobs of the same
project only, which could as well have been given such a model or such a result.

Entries are taken as they come, while the worker runs: a search whose worker, or whose server, is killed goes on from
there in its next attempt.

Nothing depends on what is kept. It is bounded for each project, what was not asked for the longest goes first, and it
goes with the model, after `blob_ttl_s` without use, or when room is short.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import os
import re
import shutil
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager, suppress
from itertools import islice
from pathlib import Path

from modelpress_compression.memory import SUFFIX, kept_bytes, shrink
from modelpress_protos.v1 import job_service_pb2, model_service_pb2

from modelpress_server.names import new_id
from modelpress_server.projects import Projects
from modelpress_server.space import Space
from modelpress_server.stores.blobs import BlobStore
from modelpress_server.stores.filesystem import ArtifactError, place_file, take_file
from modelpress_server.waiting import ended, uninterrupted, wait_until

logger = logging.getLogger(__name__)

MAX_ENTRIES = 1000  # that a job leaves
COLLECT_EVERY_S = 10.0  # a model is built and judged in about as long
_ENTRY = re.compile(rf"[0-9a-f]{{64}}{re.escape(SUFFIX)}")

# By the name of each entry that was taken, the file's number and size: the time changes when a worker looks at one.
Taken = dict[str, tuple[int, int]]


class Findings:
    """The folder `root`. Its file work runs in the threads of `blobs`."""

    def __init__(self, root: Path, projects: Projects, blobs: BlobStore, space: Space) -> None:
        self._root = root
        self._projects = projects
        self._blobs = blobs
        self._space = space

    def limit_bytes(self, project: str) -> int:
        """How much is kept of a project; 0: nothing."""
        return self._projects.limits(project).findings_bytes

    async def lay_out(
        self, project: str, spec: job_service_pb2.JobSpec, model: model_service_pb2.Model, target: Path, *, link: bool
    ) -> bool:
        """Puts what is known of the job's model and data into the folder `target`: files that nobody may change.

        Whether anything is known. `link`: the worker cannot change them, so that it may be given the kept files
        themselves.
        """
        with suppress(FileNotFoundError):
            return await self._blobs.run(_lay_out, self._folder(project, spec, model), target, link)
        return False

    @asynccontextmanager
    async def collecting(
        self, project: str, spec: job_service_pb2.JobSpec, model: model_service_pb2.Model, found: Path
    ) -> AsyncIterator[None]:
        """Keeps what a worker leaves in the folder `found` as it comes, and all of it when the worker has ended,
        however that was. A job does not fail for it."""
        over = asyncio.Event()
        collecting = asyncio.create_task(self._collect_until(over, project, self._folder(project, spec, model), found))
        try:
            yield
        finally:
            over.set()
            await uninterrupted(ended(collecting))

    async def _collect_until(self, over: asyncio.Event, project: str, target: Path, found: Path) -> None:
        taken: Taken = {}
        while not await wait_until(over, COLLECT_EVERY_S):
            await self._collect(project, target, found, taken)
        await self._collect(project, target, found, taken)

    async def _collect(self, project: str, target: Path, found: Path, taken: Taken) -> None:
        try:
            async with self._space.left() as left_bytes:
                limit_bytes = min(self.limit_bytes(project), left_bytes)
                if not await self._blobs.run(_collect, found, target, limit_bytes, taken):
                    return
            await self._blobs.run(shrink, target.parent, self.limit_bytes(project))
        except Exception as error:  # noqa: BLE001  # a job does not fail for it
            logger.warning("project %s: what a job has found out could not be kept: %s", project, error)

    async def stored_bytes(self, project: str) -> int:
        """How many bytes are kept of a project."""
        return await self._blobs.run(kept_bytes, self._root / project)

    async def forget(self, project: str, model: model_service_pb2.Model) -> None:
        """Removes all that is kept of a model."""
        await self._blobs.run(_remove, list((self._root / project).glob(f"{_model_part(model)}-*")))

    async def remove_older_than(self, time_s: float) -> None:
        """Removes what no job asked for since `time_s`."""
        await self._blobs.run(_remove_older_than, self._root, time_s)

    def _folder(self, project: str, spec: job_service_pb2.JobSpec, model: model_service_pb2.Model) -> Path:
        return self._root / project / f"{_model_part(model)}-{spec.data.sha256.hex()[:32]}"


def _model_part(model: model_service_pb2.Model) -> str:
    """Of a folder's name: the files' contents decide, since the same model may be uploaded again."""
    digests = b"".join(sorted(entry.digest.sha256 for entry in model.files))
    return hashlib.sha256(digests).hexdigest()[:32]


def _lay_out(folder: Path, target: Path, link: bool) -> bool:
    found = False
    for entry in os.scandir(folder):
        with suppress(FileNotFoundError):  # another job of the project makes room meanwhile
            os.utime(entry.path)
            place_file(Path(entry.path), target / entry.name, link=link)
            found = True
    return found


def _collect(found: Path, target: Path, limit_bytes: int, taken: Taken) -> bool:
    """Takes the entries that are not in `taken` yet, or have changed since; whether there were any."""
    with os.scandir(found) as entries:
        some = list(islice(entries, MAX_ENTRIES + 1))
    if len(some) > MAX_ENTRIES:
        raise ArtifactError(f"the worker left more than {MAX_ENTRIES} files")
    new = {entry.name: stamp for entry in some if (stamp := _stamp(entry)) and taken.get(entry.name) != stamp}
    for folder in (target.parent.parent, target.parent, target):
        if new:
            folder.mkdir(mode=0o700, exist_ok=True)
    for name, stamp in new.items():
        temporary = target / f"{new_id()}.partial"
        try:
            limit_bytes -= take_file(found, name, temporary, limit_bytes).size_bytes
            temporary.chmod(0o444)
            temporary.replace(target / name)
        finally:
            temporary.unlink(missing_ok=True)
        taken[name] = stamp
    return bool(new)


def _stamp(entry: os.DirEntry[str]) -> tuple[int, int] | None:
    """What tells one version of an entry from another; None: it is no entry, or gone by now."""
    if _ENTRY.fullmatch(entry.name):
        with suppress(FileNotFoundError):
            status = entry.stat(follow_symlinks=False)
            return status.st_ino, status.st_size
    return None


def _remove_older_than(root: Path, time_s: float) -> None:
    with suppress(FileNotFoundError):
        for project in os.scandir(root):
            _remove(Path(kept.path) for kept in os.scandir(project.path) if _last_use_s(Path(kept.path)) < time_s)
            with suppress(OSError):  # not empty
                os.rmdir(project.path)  # noqa: PTH106  # beside scandir


def _last_use_s(folder: Path) -> float:
    return max((path.lstat().st_mtime for path in folder.iterdir()), default=0.0)


def _remove(folders: Iterable[Path]) -> None:
    for folder in folders:
        shutil.rmtree(folder, ignore_errors=True)
