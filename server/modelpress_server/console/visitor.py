"""What the API answers to somebody who looks at the console.

Each look is a call of a method of the API, with the roles, limits and the audit that it has there: a page can show
nothing that its caller could not read over gRPC.
"""

from __future__ import annotations

from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any

from modelpress_protos.v1 import (
    common_pb2,
    job_service_pb2,
    model_service_pb2,
    server_service_pb2,
    upload_service_pb2,
)

from modelpress_server.identity.roles import Caller
from modelpress_server.interceptors import Gate
from modelpress_server.services.job_service import JobService
from modelpress_server.services.model_service import ModelService
from modelpress_server.services.server_service import ServerService
from modelpress_server.services.upload_service import UploadService
from modelpress_server.stores.overview import StoreOverview


@dataclass(frozen=True)
class Services:
    """The API within this process."""

    gate: Gate
    jobs: JobService
    models: ModelService
    uploads: UploadService
    server: ServerService
    overview: StoreOverview


class Visitor:
    """A caller and where he comes from. All methods raise ServiceError, as the API does."""

    def __init__(self, services: Services, caller: Caller, peer: str, renew: Callable[[], Awaitable[Caller]]) -> None:
        """`renew`: finds out again who it is; raises UnauthenticatedError where the token holds no longer."""
        self._services = services
        self._peer = peer
        self._renew = renew
        self.caller = caller

    async def projects(self) -> Mapping[str, Mapping[str, int]]:
        """The projects that there are for the caller, with their jobs by state; also those that he has a role in."""
        found = await self._services.overview.jobs_by_project()
        named = dict.fromkeys(project for project in (*found, *self.caller.grants) if project != "*")
        return {name: found.get(name, {}) for name in sorted(named) if self.caller.role(name) is not None}

    async def server(self) -> server_service_pb2.ServerInfo:
        """What the server is."""
        info: server_service_pb2.ServerInfo = await self._ask(
            self._services.server.GetServerInfo, server_service_pb2.GetServerInfoRequest()
        )
        return info

    async def usage(self, project: str) -> server_service_pb2.Usage:
        """What a project has and has used."""
        request = server_service_pb2.GetUsageRequest(parent=f"projects/{project}")
        usage: server_service_pb2.Usage = await self._ask(self._services.server.GetUsage, request)
        return usage

    async def jobs(self, **fields: Any) -> job_service_pb2.ListJobsResponse:
        """A page of jobs; `fields` of ListJobsRequest."""
        request = job_service_pb2.ListJobsRequest(**fields)
        page: job_service_pb2.ListJobsResponse = await self._ask(self._services.jobs.ListJobs, request)
        return page

    async def job(self, name: str) -> job_service_pb2.Job:
        """One job."""
        request = job_service_pb2.GetJobRequest(name=name)
        job: job_service_pb2.Job = await self._ask(self._services.jobs.GetJob, request)
        return job

    async def model(self, name: str) -> model_service_pb2.Model:
        """One model."""
        request = model_service_pb2.GetModelRequest(name=name)
        model: model_service_pb2.Model = await self._ask(self._services.models.GetModel, request)
        return model

    async def log(self, name: str, most: int) -> list[job_service_pb2.StreamJobLogsResponse]:
        """The last lines of a job's log."""
        request = job_service_pb2.StreamJobLogsRequest(name=name)
        last: deque[job_service_pb2.StreamJobLogsResponse] = deque(maxlen=most)
        async for line in self._stream(self._services.jobs.StreamJobLogs, request):
            last.append(line)
        return list(last)

    def watch(self, name: str, after_sequence: int) -> AsyncGenerator[job_service_pb2.WatchJobResponse, None]:
        """What happens to a job."""
        request = job_service_pb2.WatchJobRequest(name=name, after_sequence=after_sequence)
        return self._stream(self._services.jobs.WatchJob, request)

    async def read(self, project: str, digest: common_pb2.Digest) -> AsyncIterator[bytes]:
        """The content of a blob, in parts."""
        request = upload_service_pb2.ReadBlobRequest(parent=f"projects/{project}", digest=digest)
        async for part in self._stream(self._services.uploads.ReadBlob, request):
            yield part.data

    async def _ask(self, method: Callable[[Any, Any], Awaitable[Any]], request: Any) -> Any:
        return await self._services.gate.ask(method, request, caller=self.caller, peer=self._peer)

    def _stream(self, method: Callable[[Any, Any], AsyncIterator[Any]], request: Any) -> AsyncGenerator[Any, None]:
        return self._services.gate.stream(method, request, caller=self.caller, peer=self._peer, renew=self._renew)
