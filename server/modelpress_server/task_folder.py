"""The working folder of one task: the model's files under their manifest paths, data files, a place for artifacts."""

from __future__ import annotations

import re
import shutil
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from modelpress_protos.internal.v1 import worker_pb2
from modelpress_protos.v1 import common_pb2, job_service_pb2, model_service_pb2

from modelpress_server.config import MIB
from modelpress_server.executors.base import Limits, WorkerLostError
from modelpress_server.names import new_id, path_fault
from modelpress_server.stores.blobs import BlobKey, BlobStore
from modelpress_server.stores.filesystem import ArtifactError
from modelpress_server.waiting import uninterrupted

MAX_ARTIFACT_FILES = 1000
# What a compression writes besides the copy of its model, in sizes of the model: candidates, the result twice, and the
# candidates that can be downloaded (at most 2.5 times the model).
WRITTEN_PER_MODEL_BYTE = 4.9
# Of what it leaves for later jobs, the candidates are most.
FOUND_PER_MODEL_BYTE = 3.0
# Data is copied and unpacked.
WRITTEN_PER_DATA_BYTE = 3
WRITTEN_BESIDES_BYTES = 2 * MIB  # reports, logs, and what else is small
_CANDIDATE = re.compile("[a-z0-9]{0,16}")


def job_need_bytes(spec: job_service_pb2.JobSpec, manifest: model_service_pb2.Model, findings_bytes: int = 0) -> int:
    """About how much room on the disk a compression needs. `findings_bytes`: the most that it leaves for others."""
    model_bytes = sum(blob.size_bytes for blob in {BlobKey.of(entry.digest) for entry in manifest.files})
    data_bytes = spec.data.size_bytes + spec.eval_data.size_bytes
    written = WRITTEN_PER_MODEL_BYTE * model_bytes + WRITTEN_PER_DATA_BYTE * data_bytes
    written += min(findings_bytes, FOUND_PER_MODEL_BYTE * model_bytes)
    return round(written) + inspection_need_bytes(manifest)


def inspection_need_bytes(model: model_service_pb2.Model) -> int:
    """About how much room on the disk an inspection needs.

    A blob that stands under many names is copied for each; of an archive, torch is given a copy of its checked members.
    """
    file_bytes = sum(entry.digest.size_bytes for entry in model.files)
    copied_bytes = model.files[0].digest.size_bytes if len(model.files) == 1 else 0
    return file_bytes + copied_bytes + WRITTEN_BESIDES_BYTES


@dataclass(frozen=True)
class TaskFolder:
    """A folder of its own for each run; removed with everything in it.

    `link`: where that is possible the worker gets the stored files themselves, which it must not be able to change;
    else copies.
    """

    root: Path
    blobs: BlobStore
    link: bool = False

    @property
    def known(self) -> Path:
        """Folder of what earlier jobs have found out."""
        return self.root / "known"

    @property
    def found(self) -> Path:
        """Folder of what this job finds out."""
        return self.root / "found"

    async def inspect_request(self, model: model_service_pb2.Model) -> worker_pb2.WorkerRequest:
        """Lays the model out for an inspection."""
        return worker_pb2.WorkerRequest(inspect=worker_pb2.InspectTask(model=await self._lay_out(model)))

    async def compress_request(
        self, job: job_service_pb2.Job, manifest: model_service_pb2.Model, limits: Limits, findings_bytes: int = 0
    ) -> worker_pb2.WorkerRequest:
        """Lays model and data out for a compression.

        `findings_bytes`: what it may leave of its findings for later jobs, in the folder `found`; 0: nothing. What is
        known already is to be put into the folder `known`.
        """
        output = self.root / "output"
        for folder in (output, self.known, self.found):
            await self.blobs.run(folder.mkdir, mode=0o700)
        spec = job.spec
        task = worker_pb2.CompressTask(
            job=job.name,
            model=await self._lay_out(manifest),
            recipe=spec.recipe,
            data_path=await self._data_file("data.npz", spec.data if spec.HasField("data") else None),
            eval_path=await self._data_file("eval.npz", spec.eval_data if spec.HasField("eval_data") else None),
            output_directory=str(output),
            time_limit_s=limits.time_s,
            memory_limit_bytes=limits.memory_bytes,
            known_directory=str(self.known),
            found_directory=str(self.found),
            findings_bytes=findings_bytes,
        )
        return worker_pb2.WorkerRequest(compress=task)

    async def collect(
        self, produced: Sequence[worker_pb2.ProducedArtifact], max_bytes: int
    ) -> list[job_service_pb2.Artifact]:
        """Takes the artifacts into the blob store.

        Raises WorkerLostError for what is no plain file of the folder: no worker of ours leaves such a thing, so it was
        taken over.
        """
        try:
            return await self._collect(produced, max_bytes)
        except ArtifactError as error:
            raise WorkerLostError("WORKER_CRASHED", f"The worker left no result that can be taken: {error}.") from error

    async def _collect(
        self, produced: Sequence[worker_pb2.ProducedArtifact], max_bytes: int
    ) -> list[job_service_pb2.Artifact]:
        if sum(len(item.paths) for item in produced) > MAX_ARTIFACT_FILES:
            raise ArtifactError(f"the worker left more than {MAX_ARTIFACT_FILES} files")
        artifacts = []
        for item in produced:
            if not _CANDIDATE.fullmatch(item.candidate):
                raise ArtifactError("the worker names a candidate in a way that none of ours has")
            artifact = job_service_pb2.Artifact(kind=item.kind, candidate=item.candidate)
            for path in item.paths:
                fault = path_fault(path)
                if fault is not None:
                    raise ArtifactError(f"the path of an artifact {fault}")
                blob = await self.blobs.ingest(self.root / "output", path, max_bytes=max_bytes)
                artifact.files.append(common_pb2.FileEntry(path=path, digest=blob.to_digest()))
            artifacts.append(artifact)
        return artifacts

    async def _lay_out(self, model: model_service_pb2.Model) -> worker_pb2.ModelFiles:
        folder = self.root / "model"
        for index, entry in enumerate(model.files):
            target = folder / entry.path
            await self.blobs.run(target.parent.mkdir, mode=0o700, parents=True, exist_ok=True)
            # onnx refuses external data that has more than one name: it might be another's file.
            await self.blobs.place(BlobKey.of(entry.digest), target, link=self.link and index == 0)
        files = worker_pb2.ModelFiles(
            directory=str(folder), paths=[entry.path for entry in model.files], input_hints=model.input_hints
        )
        if model.HasField("source"):
            files.source.CopyFrom(model.source)
        return files

    async def _data_file(self, name: str, digest: common_pb2.Digest | None) -> str:
        if digest is None:
            return ""
        target = self.root / name
        await self.blobs.place(BlobKey.of(digest), target, link=self.link)
        return str(target)


@asynccontextmanager
async def task_folder(work: Path, blobs: BlobStore, *, link: bool = False) -> AsyncIterator[TaskFolder]:
    """Makes a folder below `work` and removes it in the end, however the task ends."""
    root = work / new_id()
    await blobs.run(root.mkdir, mode=0o700, parents=True)
    try:
        yield TaskFolder(root, blobs, link)
    finally:
        await uninterrupted(blobs.run(shutil.rmtree, root, ignore_errors=True))
