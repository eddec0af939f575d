"""ServerService: what this server is and allows."""

from __future__ import annotations

from functools import cache
from typing import Any

from modelpress_compression.options import schema_of
from modelpress_compression.target import measured_devices
from modelpress_compression.techniques import TECHNIQUES
from modelpress_protos.formats import FORMATS
from modelpress_protos.v1 import common_pb2, job_service_pb2, server_service_pb2, server_service_pb2_grpc

from modelpress_server.config import Settings
from modelpress_server.executors.base import WorkerHost
from modelpress_server.findings import Findings
from modelpress_server.interceptors import check_project
from modelpress_server.names import parse_project
from modelpress_server.projects import Projects
from modelpress_server.recipes import preset_messages
from modelpress_server.sandbox.confinement import LEVEL_FILES_AND_NETWORK
from modelpress_server.stores.jobs import ENDED_STATES, JobStore
from modelpress_server.stores.usage import UsageStore
from modelpress_server.toolchain import made_by, toolchain

API_VERSIONS = ("modelpress.v1",)
_AT_WORK = (job_service_pb2.JOB_STATE_RUNNING, job_service_pb2.JOB_STATE_CANCELLING)


class ServerService(server_service_pb2_grpc.ServerServiceServicer):
    """Versions, limits, techniques, presets, load."""

    def __init__(
        self,
        settings: Settings,
        projects: Projects,
        jobs: JobStore,
        usage: UsageStore,
        findings: Findings,
        executor: WorkerHost,
    ) -> None:
        self._projects = projects
        self._usage = usage
        self._findings = findings
        self._settings = settings
        self._jobs = jobs
        self._executor = executor

    async def GetServerInfo(  # noqa: N802  # the name of the method in the API
        self, request: server_service_pb2.GetServerInfoRequest, context: Any
    ) -> server_service_pb2.ServerInfo:
        settings = self._settings
        queued, running = await self._jobs.counts()
        confined = settings.sandbox != "require" or self._executor.sandbox_level >= LEVEL_FILES_AND_NETWORK
        return server_service_pb2.ServerInfo(
            version=toolchain().get("modelpress", ""),
            api_versions=API_VERSIONS,
            max_blob_bytes=settings.max_blob_bytes,
            max_chunk_bytes=settings.max_chunk_bytes,
            max_queued_jobs=settings.max_queued_jobs,
            max_run_seconds=settings.run_time_limit_s,
            worker_memory_bytes=settings.worker_memory_bytes,
            formats=_formats(confined=confined),
            techniques=_techniques(),
            presets=preset_messages(),
            devices=_devices(),
            sandbox_level=self._executor.sandbox_level,
            separate_worker_users=self._executor.separate_users,
            toolchain=toolchain(),
            queued_jobs=queued,
            running_jobs=running,
            workers=settings.workers,
        )

    async def GetUsage(  # noqa: N802
        self, request: server_service_pb2.GetUsageRequest, context: Any
    ) -> server_service_pb2.Usage:
        project = check_project(parse_project(request.parent))
        found, limits = await self._usage.of(project), self._projects.limits(project)
        return server_service_pb2.Usage(
            parent=request.parent,
            stored_bytes=found.stored_bytes,
            blobs=found.blobs,
            models=found.models,
            open_uploads=found.uploads,
            queued_jobs=found.jobs.get(job_service_pb2.JOB_STATE_QUEUED, 0),
            running_jobs=sum(found.jobs.get(state, 0) for state in _AT_WORK),
            ended_jobs=sum(found.jobs.get(state, 0) for state in ENDED_STATES),
            runs=found.runs,
            cpu_seconds=found.cpu_s,
            run_seconds=found.run_s,
            weight=limits.weight,
            max_models=limits.max_models,
            max_queued_jobs=limits.max_queued_jobs,
            max_running_jobs=limits.max_running_jobs,
            max_open_uploads=limits.max_open_uploads,
            max_stored_bytes=limits.max_stored_bytes,
            findings_bytes=await self._findings.stored_bytes(project),
            max_findings_bytes=limits.findings_bytes,
            max_requests_per_second=limits.requests_per_s,
            job_ttl_seconds=limits.job_ttl_s,
            model_ttl_seconds=limits.model_ttl_s,
        )


def read_once() -> None:
    """Reads what answers need of what is installed, and what does not change: the first who asks need not wait."""
    made_by()
    _devices()
    _techniques()
    preset_messages()


def _formats(*, confined: bool) -> list[common_pb2.ModelFormat.ValueType]:
    """What the workers read. Code is read only where it is confined, if that is required."""
    rows = [row for row in FORMATS if row.loader and (confined or not row.carries_code)]
    return [common_pb2.ModelFormat.Value(row.proto_name) for row in sorted(rows, key=lambda row: row.number)]


@cache
def _devices() -> tuple[str, ...]:
    """They are looked for among what is installed, which takes long enough to look once."""
    return measured_devices()


@cache
def _techniques() -> tuple[server_service_pb2.Technique, ...]:
    return tuple(
        server_service_pb2.Technique(
            name=technique.name,
            summary=technique.summary,
            options=[
                server_service_pb2.Option(
                    name=option.name,
                    type=option.type_text,
                    default_value=option.default_text,
                    allowed=option.allowed,
                    range=option.range_text(),
                    description=option.help,
                )
                for option in schema_of(technique.config_class).options
            ],
        )
        for technique in TECHNIQUES.values()
    )
