"""A job on the server, for asyncio."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from modelpress_protos.v1 import job_service_pb2 as pb

from modelpress_client.connection import Connection
from modelpress_client.downloads import download_files, read_blob_into_memory
from modelpress_client.errors import (
    JobCancelledError,
    JobExpiredError,
    NotFoundError,
    TimedOutError,
    UsageError,
    from_job_status,
)
from modelpress_client.jsonable import to_json
from modelpress_client.report import Report
from modelpress_client.resources import ARTIFACTS, ENDED, JobEvent, job_state
from modelpress_client.transfers import OnProgress
from modelpress_client.watching import stream_logs, watch_job


class AsyncJob:
    """A job. `message` is as last read: by `refresh`, `watch`, `wait` or `cancel`."""

    def __init__(self, connection: Connection, message: pb.Job) -> None:
        self._connection = connection
        self.message = message

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.name} {self.state}>"

    @property
    def name(self) -> str:
        """projects/P/jobs/J."""
        return self.message.name

    @property
    def state(self) -> str:
        """QUEUED, RUNNING, CANCELLING, SUCCEEDED, FAILED, CANCELLED or EXPIRED."""
        return job_state(self.message.state)

    @property
    def has_ended(self) -> bool:
        """Whether nothing more will happen."""
        return self.message.state in ENDED

    def to_dict(self) -> dict[str, Any]:
        """Everything as JSON values."""
        return to_json(self.message)

    async def refresh(self) -> None:
        """Reads the job again."""
        self.message = await self._connection.call(self._connection.jobs.GetJob, pb.GetJobRequest(name=self.name))

    async def watch(self) -> AsyncIterator[JobEvent]:
        """Every event until the job has ended; survives cuts."""
        async for event, message in watch_job(self._connection, self.name):
            self.message.CopyFrom(message)
            yield event

    async def wait(self, timeout_s: float | None = None) -> Report:
        """Waits for the end and returns the report.

        Raises JobFailedError, JobCancelledError or JobExpiredError when there is no result, and TimedOutError after
        `timeout_s`; the job goes on then.
        """
        try:
            async with asyncio.timeout(timeout_s):
                if not self.has_ended:
                    async for _ in self.watch():
                        pass
        except TimeoutError:
            raise TimedOutError(
                f"{self.name} has not ended within {timeout_s:g} s and goes on; it is {self.state}.",
                details={"job": self.name, "state": self.state},
            ) from None
        return await self.report()

    def raise_unless_succeeded(self) -> None:
        """Raises the exception for a job without a result."""
        state, details = self.message.state, {"job": self.name, "state": self.state}
        if state == pb.JOB_STATE_FAILED:
            raise from_job_status(self.message.error, details=details)
        if state == pb.JOB_STATE_CANCELLED:
            raise JobCancelledError(f"{self.name} was cancelled.", details=details)
        if state == pb.JOB_STATE_EXPIRED:
            raise JobExpiredError(f"{self.name} found no free worker within its queue timeout.", details=details)
        if state != pb.JOB_STATE_SUCCEEDED:
            raise UsageError(
                f"{self.name} is {self.state}; there is no result yet. Wait for it with 'watch'.",
                reason="WRONG_STATE",
                details=details,
            )

    async def report(self) -> Report:
        """The report of a job that has succeeded; the exception of one that has not."""
        return Report.from_json(await self.read_artifact("report.json"))

    async def read_artifact(self, artifact: str) -> bytes:
        """`report.json` or `report.html` as bytes."""
        return await read_blob_into_memory(self._connection, self._artifact(artifact).files[0].digest)

    @property
    def candidates(self) -> list[str]:
        """The ids of the candidates whose models can be downloaded; `report` has the figures of all."""
        return [item.candidate for item in self.message.artifacts if item.kind == pb.Artifact.KIND_CANDIDATE_MODEL]

    async def download(
        self,
        path: str | Path,
        *,
        artifact: str = "model",
        candidate: str | None = None,
        on_progress: OnProgress | None = None,
    ) -> list[Path]:
        """Writes one of `artifacts` (`model`, `report.json` ...) to `path`; or the model of a candidate, by its id.

        An ONNX model with external data is several files: the main one goes to `path`, its data files beside it under
        their own names. Returns the paths written, `path` first.
        """
        files = (self._artifact(artifact) if candidate is None else self._candidate(candidate)).files
        return await download_files(self._connection, files, Path(path), on_progress)

    async def cancel(self) -> None:
        """Asks for cancellation; a job that has ended stays as it is."""
        self.message = await self._connection.call(self._connection.jobs.CancelJob, pb.CancelJobRequest(name=self.name))

    async def logs(self, *, follow: bool = False) -> AsyncIterator[pb.StreamJobLogsResponse]:
        """The lines of its log; with `follow` until it has ended."""
        async for line in stream_logs(self._connection, self.name, follow=follow):
            yield line

    @property
    def artifacts(self) -> list[str]:
        """What can be downloaded by these names; empty while the job goes on."""
        kinds = {item.kind for item in self.message.artifacts if item.files}
        return [name for name, kind in ARTIFACTS.items() if kind in kinds]

    def _artifact(self, artifact: str) -> pb.Artifact:
        if artifact not in ARTIFACTS:
            raise UsageError(f"'{artifact}' is not an artifact; there are {', '.join(ARTIFACTS)}")
        self.raise_unless_succeeded()
        for item in self.message.artifacts:
            if item.kind == ARTIFACTS[artifact] and item.files:
                return item
        raise NotFoundError(f"{self.name} has no {artifact}.", details={"job": self.name})

    def _candidate(self, candidate: str) -> pb.Artifact:
        self.raise_unless_succeeded()
        for item in self.message.artifacts:
            if item.candidate == candidate and item.kind == pb.Artifact.KIND_CANDIDATE_MODEL and item.files:
                return item
        known = ", ".join(self.candidates)
        raise NotFoundError(
            f"{self.name} has no candidate '{candidate}' to download; "
            + (f"there are {known}." if known else "recipes with a goal have them, and this one has none."),
            details={"job": self.name, "candidates": self.candidates},
        )
