"""A small real server with scripted faults, in a thread of its own, for the client's tests."""

from __future__ import annotations

import asyncio
import hashlib
import itertools
import json
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import google_crc32c
import grpc
import pytest
from google.protobuf import empty_pb2
from google.protobuf.any_pb2 import Any as AnyMessage
from google.protobuf.duration_pb2 import Duration
from google.rpc import code_pb2, error_details_pb2, status_pb2
from modelpress_client.settings import RetryPolicy
from modelpress_protos.recipe import STEP, from_dict
from modelpress_protos.v1 import common_pb2 as common
from modelpress_protos.v1 import job_service_pb2 as jobs
from modelpress_protos.v1 import job_service_pb2_grpc as jobs_grpc
from modelpress_protos.v1 import model_service_pb2 as models
from modelpress_protos.v1 import model_service_pb2_grpc as models_grpc
from modelpress_protos.v1 import server_service_pb2 as server_pb
from modelpress_protos.v1 import server_service_pb2_grpc as server_grpc
from modelpress_protos.v1 import upload_service_pb2 as uploads
from modelpress_protos.v1 import upload_service_pb2_grpc as uploads_grpc

CHUNK_BYTES = 64 * 1024
OPTIMIZED = bytes(range(256)) * 2000  # 512 kB: several chunks

REPORT: dict[str, Any] = {
    "schema_version": 1,
    "job": "projects/default/jobs/j1",
    "recipe": {"version": 1},
    "original": {
        "format": "torchscript",
        "sha256": "00",
        "size_bytes": 100_000,
        "onnx_size_bytes": 98_700,
        "parameters": 24_600,
        "nonzero_parameters": 24_600,
        "macs": 1_234_567,
        "opset": 20,
        "ops": {"Conv": 2},
    },
    "optimized": {
        "format": "onnx",
        "sha256": "01",
        "size_bytes": 27_100,
        "parameters": 24_600,
        "nonzero_parameters": 12_300,
        "macs": None,
        "opset": 20,
        "ops": {"QLinearConv": 2},
    },
    "size_ratio": 3.642,
    "latency": [
        {
            "execution_provider": "CPUExecutionProvider",
            "threads": 1,
            "batch_size": 1,
            "rounds": 50,
            "original": {"p50_ms": 0.213, "p90_ms": 0.22, "p99_ms": 0.3, "mean_ms": 0.22},
            "optimized": {"p50_ms": 0.11, "p90_ms": 0.12, "p99_ms": 0.2, "mean_ms": 0.12},
            "speedup": {"median": 1.93, "low": 1.8, "high": 2.0},
        }
    ],
    "fidelity": {
        "data": "synthetic",
        "samples": 64,
        "outputs": {"y": {"cosine": 0.99991, "sqnr_db": 41.2, "max_abs_error": 0.012}},
        "top1_agreement": 0.984375,
    },
    "accuracy": {"metric": "top1", "samples": 2000, "original": 0.978, "optimized": 0.977, "drop": 0.001},
    "steps": [
        {
            "name": "fuse",
            "config": {},
            "changes": {"conv_batchnorm": 20},
            "skipped": [{"node": "conv_3", "reason": "weight is not constant"}],
            "size_bytes": 98_000,
            "duration_s": 0.2,
        }
    ],
    "candidates": [],
    "layers": [
        {
            "name": "conv_3",
            "op_type": "Conv",
            "original_bytes": 4000,
            "optimized_bytes": 1000,
            "layers": 1,
            "original_ms": 0.5,
            "optimized_ms": 0.25,
            "kernel": "QLinearConv",
            "types": "uint8, int8 → uint8",
            "error_share": 0.125,
            "why": "It computes in 8 bits, 2.0 times as fast.",
        },
        {"name": "fc", "op_type": "Gemm", "original_bytes": 400, "optimized_bytes": 400, "layers": 1},
    ],
    "warnings": ["Calibrated on synthetic inputs."],
    "environment": {"cpu": "x", "cores": 2, "onnxruntime": "1.31.1"},
    "constraints": {"met": True, "violations": []},
}


@dataclass
class Script:
    """What goes wrong; counters fall as faults happen."""

    cut_upload_after_bytes: list[int] = field(default_factory=list)
    refuse_chunks: int = 0
    busy_uploads: int = 0
    stall_uploads: int = 0
    create_upload_error: status_pb2.Status | None = None
    max_chunk_bytes: int = CHUNK_BYTES
    cut_download_after_bytes: list[int] = field(default_factory=list)
    damage_chunks: int = 0
    wrong_content: bool = False
    unavailable_calls: int = 0
    lost_answers: int = 0
    collected_blobs: int = 0
    cut_watches: int = 0
    token: str | None = None
    job_status: status_pb2.Status | None = None
    hang_job: bool = False
    constraints_met: bool = True
    data_file: str | None = None
    serving: int = 1
    changes_meanwhile: int = 0


def status(code: int, reason: str, message: str, **metadata: str) -> status_pb2.Status:
    """A status as the real server makes it."""
    packed = AnyMessage()
    packed.Pack(error_details_pb2.ErrorInfo(domain="modelpress", reason=reason, metadata=metadata))
    return status_pb2.Status(code=code, message=message, details=[packed])


def with_detail(base: status_pb2.Status, detail: Any) -> status_pb2.Status:
    """The status with one more detail."""
    packed = AnyMessage()
    packed.Pack(detail)
    base.details.append(packed)
    return base


_CODES = {code.value[0]: code for code in grpc.StatusCode}


async def fail(context: Any, error: status_pb2.Status) -> None:
    context.set_trailing_metadata((("grpc-status-details-bin", error.SerializeToString()),))
    await context.abort(_CODES[error.code], error.message)


class FakeServer(
    uploads_grpc.UploadServiceServicer,
    models_grpc.ModelServiceServicer,
    jobs_grpc.JobServiceServicer,
    server_grpc.ServerServiceServicer,
):
    """Keeps everything in memory. `script` says what goes wrong, `seen` what was called."""

    def __init__(self) -> None:
        self.script = Script()
        self.seen: list[str] = []
        self.blobs: dict[bytes, bytes] = {}
        self.partial: dict[bytes, bytearray] = {}
        self.received_bytes = 0
        self.models: dict[str, models.Model] = {}
        self.jobs: dict[str, jobs.Job] = {}
        self.by_request: dict[str, Any] = {}
        self.ids = itertools.count(1)
        self.address = ""
        self.report = json.loads(json.dumps(REPORT))

    async def enter(self, call: str, context: Any) -> None:
        self.seen.append(call)
        token = self.script.token
        if token and ("authorization", f"Bearer {token}") not in tuple(context.invocation_metadata()):
            await fail(context, status(code_pb2.UNAUTHENTICATED, "", "The token is missing or wrong."))
        if self.script.unavailable_calls > 0:
            self.script.unavailable_calls -= 1
            error = status(code_pb2.UNAVAILABLE, "DRAINING", "The server is shutting down.")
            await fail(context, with_detail(error, error_details_pb2.RetryInfo(retry_delay=Duration(nanos=10_000_000))))

    def add_blob(self, content: bytes) -> common.Digest:
        digest = hashlib.sha256(content).digest()
        self.blobs[digest] = content
        return common.Digest(sha256=digest, size_bytes=len(content))

    # --- uploads ---

    async def FindMissingBlobs(self, request: Any, context: Any) -> uploads.FindMissingBlobsResponse:
        await self.enter("FindMissingBlobs", context)
        missing = [digest for digest in request.digests if digest.sha256 not in self.blobs]
        return uploads.FindMissingBlobsResponse(missing=missing)

    async def CreateUpload(self, request: Any, context: Any) -> uploads.Upload:
        await self.enter("CreateUpload", context)
        if self.script.create_upload_error is not None:
            await fail(context, self.script.create_upload_error)
        return self._upload(request.digest)

    def _upload(self, digest: common.Digest) -> uploads.Upload:
        done = digest.sha256 in self.blobs
        return uploads.Upload(
            name=f"projects/default/uploads/{digest.sha256.hex()}-{digest.size_bytes}",
            digest=digest,
            state=uploads.Upload.STATE_COMPLETED if done else uploads.Upload.STATE_ACTIVE,
            committed_size=len(self.partial.setdefault(digest.sha256, bytearray())),
            max_chunk_bytes=self.script.max_chunk_bytes,
            ack_interval_bytes=4 * CHUNK_BYTES,
        )

    async def WriteUpload(self, requests: AsyncIterator[Any], context: Any) -> AsyncIterator[Any]:
        await self.enter("WriteUpload", context)
        script = self.script
        if script.busy_uploads:
            script.busy_uploads -= 1
            await fail(context, status(code_pb2.ABORTED, "UPLOAD_BUSY", "Another writer."))
        if script.stall_uploads:
            script.stall_uploads -= 1
            await asyncio.Event().wait()
        limit = script.cut_upload_after_bytes.pop(0) if script.cut_upload_after_bytes else None
        name, got = "", 0
        async for request in requests:
            name = name or request.name
            digest, size = name.rsplit("/", 1)[1].split("-")
            stored = self.partial[bytes.fromhex(digest)]
            assert len(request.data) <= script.max_chunk_bytes
            if script.refuse_chunks or google_crc32c.value(request.data) != request.crc32c:
                script.refuse_chunks -= 1
                await fail(context, status(code_pb2.ABORTED, "CHUNK_CHECKSUM_MISMATCH", "A chunk is damaged."))
            if request.write_offset != len(stored):
                await fail(context, status(code_pb2.OUT_OF_RANGE, "OFFSET_MISMATCH", "Wrong offset."))
            stored += request.data
            got += len(request.data)
            self.received_bytes += len(request.data)
            if limit is not None and got >= limit:
                await context.abort(grpc.StatusCode.UNAVAILABLE, "Socket closed")
            yield uploads.WriteUploadResponse(committed_size=len(stored))
            if request.finish_write:
                if hashlib.sha256(stored).hexdigest() != digest or len(stored) != int(size):
                    await fail(context, status(code_pb2.INVALID_ARGUMENT, "DIGEST_MISMATCH", "Other content."))
                self.blobs[bytes.fromhex(digest)] = bytes(stored)
                final = self._upload(common.Digest(sha256=bytes.fromhex(digest), size_bytes=int(size)))
                yield uploads.WriteUploadResponse(committed_size=len(stored), upload=final)
                return

    async def ReadBlob(self, request: Any, context: Any) -> AsyncIterator[Any]:
        await self.enter(f"ReadBlob {request.read_offset}", context)
        content = self.blobs.get(request.digest.sha256)
        if content is None:
            await fail(context, status(code_pb2.NOT_FOUND, "RESOURCE_NOT_FOUND", "No such blob."))
            return
        if self.script.wrong_content:
            content = b"x" * len(content)
        limit = self.script.cut_download_after_bytes.pop(0) if self.script.cut_download_after_bytes else None
        for offset in range(request.read_offset, len(content), CHUNK_BYTES):
            if limit is not None and offset - request.read_offset >= limit:
                await context.abort(grpc.StatusCode.UNAVAILABLE, "Socket closed")
            data = content[offset : offset + CHUNK_BYTES]
            crc = google_crc32c.value(data)
            if self.script.damage_chunks:
                self.script.damage_chunks -= 1
                crc ^= 1
            yield uploads.ReadBlobResponse(offset=offset, crc32c=crc, data=data)

    # --- models ---

    async def CreateModel(self, request: Any, context: Any) -> models.Model:
        await self.enter("CreateModel", context)
        if self.script.collected_blobs:
            self.script.collected_blobs -= 1
            self.blobs.clear()
            self.partial.clear()
            await fail(context, status(code_pb2.FAILED_PRECONDITION, "BLOB_MISSING", "A blob is gone."))
        model = self.by_request.get(request.request_id)
        if model is None:
            model = models.Model()
            model.CopyFrom(request.model)
            model.name = f"{request.parent}/models/m{next(self.ids)}"
            model.state = models.Model.STATE_ACTIVE
            model.format = common.MODEL_FORMAT_ONNX
            model.create_time.FromSeconds(1_700_000_000)
            model.inspection.parameter_count = 24_600
            model.inspection.inputs.add(name="x", dtype="float32", shape=[common.Dim(symbol="N"), common.Dim(value=4)])
            model.inspection.op_counts["Conv"] = 2
            model.inspection.findings.add(severity=2, code="SMALL", detail="It is small.")
            self.models[model.name] = self.by_request[request.request_id] = model
        if self.script.lost_answers:
            self.script.lost_answers -= 1
            await context.abort(grpc.StatusCode.UNAVAILABLE, "Connection reset")
        return model

    async def GetModel(self, request: Any, context: Any) -> models.Model:
        await self.enter("GetModel", context)
        if request.name not in self.models:
            await fail(context, status(code_pb2.NOT_FOUND, "RESOURCE_NOT_FOUND", f"There is no {request.name}."))
        return self.models[request.name]

    async def ListModels(self, request: Any, context: Any) -> models.ListModelsResponse:
        await self.enter(f"ListModels {request.filter}", context)
        found = list(reversed(self.models.values()))
        start = int(request.page_token or 0)
        size = min(request.page_size, 2)  # small pages, so that clients must ask again
        token = str(start + size) if start + size < len(found) else ""
        return models.ListModelsResponse(models=found[start : start + size], next_page_token=token)

    async def UpdateModel(self, request: Any, context: Any) -> models.Model:
        await self.enter("UpdateModel", context)
        assert request.update_mask.paths == ["labels"]
        return await self._labelled(self.models[request.model.name], request.model, context)

    async def UpdateJob(self, request: Any, context: Any) -> jobs.Job:
        await self.enter("UpdateJob", context)
        assert request.update_mask.paths == ["labels"]
        return await self._labelled(self.jobs[request.job.name], request.job, context)

    async def _labelled(self, stored: Any, given: Any, context: Any) -> Any:
        if self.script.changes_meanwhile:
            self.script.changes_meanwhile -= 1
            stored.etag += "+"
        if given.etag != stored.etag:
            await fail(context, status(code_pb2.ABORTED, "ETAG_MISMATCH", "It has changed."))
        stored.labels.clear()
        stored.labels.update(given.labels)
        return stored

    async def DeleteModel(self, request: Any, context: Any) -> empty_pb2.Empty:
        await self.enter("DeleteModel", context)
        del self.models[request.name]
        return empty_pb2.Empty()

    # --- jobs ---

    async def CreateJob(self, request: Any, context: Any) -> jobs.Job:
        await self.enter("CreateJob", context)
        job = self.by_request.get(request.request_id)
        if job is None:
            job = jobs.Job(name=f"{request.parent}/jobs/j{next(self.ids)}", spec=request.job.spec)
            job.labels.update(request.job.labels)
            job.state = jobs.JOB_STATE_QUEUED
            job.create_time.FromSeconds(1_700_000_000)
            self.jobs[job.name] = self.by_request[request.request_id] = job
        if self.script.lost_answers:
            self.script.lost_answers -= 1
            await context.abort(grpc.StatusCode.UNAVAILABLE, "Connection reset")
        return job

    def finish(self, job: jobs.Job) -> None:
        if self.script.job_status is not None:
            job.state = jobs.JOB_STATE_FAILED
            job.error.CopyFrom(self.script.job_status)
            return
        self.report["job"] = job.name
        self.report["constraints"] = {"met": self.script.constraints_met, "violations": []}
        if not self.script.constraints_met:
            self.report["constraints"]["violations"] = ["max_drop: 0.03 is more than 0.01"]
        job.state = jobs.JOB_STATE_SUCCEEDED
        job.summary.original_size_bytes, job.summary.optimized_size_bytes = 98_700, 27_100
        job.summary.constraints_met = self.script.constraints_met
        files = [common.FileEntry(path="model.onnx", digest=self.add_blob(OPTIMIZED))]
        if self.script.data_file:
            files.append(common.FileEntry(path=self.script.data_file, digest=self.add_blob(b"weights" * 1000)))
        job.artifacts.add(kind=jobs.Artifact.KIND_OPTIMIZED_MODEL, files=files)
        for row in self.report["candidates"]:
            entry = common.FileEntry(path="model.onnx", digest=self.add_blob(row["id"].encode()))
            kind = jobs.Artifact.KIND_CANDIDATE_MODEL
            job.artifacts.add(kind=kind, files=[entry], candidate=row["id"])
        for kind, path, content in (
            (jobs.Artifact.KIND_REPORT_JSON, "report.json", json.dumps(self.report)),
            (jobs.Artifact.KIND_REPORT_HTML, "report.html", "<html></html>"),
        ):
            digest = self.add_blob(content.encode())
            job.artifacts.add(kind=kind, files=[common.FileEntry(path=path, digest=digest)])

    async def job_of(self, name: str, context: Any) -> jobs.Job:
        if name not in self.jobs:
            await fail(context, status(code_pb2.NOT_FOUND, "RESOURCE_NOT_FOUND", f"There is no {name}."))
        return self.jobs[name]

    async def GetJob(self, request: Any, context: Any) -> jobs.Job:
        await self.enter("GetJob", context)
        return await self.job_of(request.name, context)

    async def ListJobs(self, request: Any, context: Any) -> jobs.ListJobsResponse:
        await self.enter(f"ListJobs {request.filter}", context)
        return jobs.ListJobsResponse(jobs=list(reversed(self.jobs.values()))[: request.page_size])

    async def WatchJob(self, request: Any, context: Any) -> AsyncIterator[Any]:
        await self.enter(f"WatchJob {request.after_sequence}", context)
        job = await self.job_of(request.name, context)
        yield jobs.WatchJobResponse(snapshot=job)
        stages = ["load", "fuse", "measure"]
        job.state = jobs.JOB_STATE_RUNNING
        for sequence, stage in enumerate(stages, 1):
            if sequence <= request.after_sequence:
                continue
            progress = jobs.Progress(
                stage=stage, stage_index=sequence - 1, stage_count=3, fraction=sequence / 3, message="at it"
            )
            yield jobs.WatchJobResponse(sequence=sequence, progress=progress)
            if self.script.cut_watches:
                self.script.cut_watches -= 1
                await context.abort(grpc.StatusCode.UNAVAILABLE, "Socket closed")
        while self.script.hang_job and job.state == jobs.JOB_STATE_RUNNING:
            yield jobs.WatchJobResponse(heartbeat=jobs.Heartbeat())
            await asyncio.sleep(0.05)
        if job.state == jobs.JOB_STATE_RUNNING:
            self.finish(job)
        yield jobs.WatchJobResponse(sequence=4, state=job.state)
        yield jobs.WatchJobResponse(snapshot=job)

    async def CancelJob(self, request: Any, context: Any) -> jobs.Job:
        await self.enter("CancelJob", context)
        job = await self.job_of(request.name, context)
        job.state = jobs.JOB_STATE_CANCELLED
        return job

    async def DeleteJob(self, request: Any, context: Any) -> empty_pb2.Empty:
        await self.enter("DeleteJob", context)
        job = await self.job_of(request.name, context)
        if job.state == jobs.JOB_STATE_RUNNING:
            await fail(context, status(code_pb2.FAILED_PRECONDITION, "WRONG_STATE", "It still runs; cancel it first."))
        del self.jobs[request.name]
        return empty_pb2.Empty()

    async def StreamJobLogs(self, request: Any, context: Any) -> AsyncIterator[Any]:
        await self.enter(f"StreamJobLogs {request.after_sequence}", context)
        for sequence in range(request.after_sequence + 1, 4):
            yield jobs.StreamJobLogsResponse(sequence=sequence, severity="INFO", text=f"line {sequence}")
            if self.script.cut_watches:
                self.script.cut_watches -= 1
                await context.abort(grpc.StatusCode.UNAVAILABLE, "Socket closed")

    # --- server ---

    async def GetServerInfo(self, request: Any, context: Any) -> server_pb.ServerInfo:
        await self.enter("GetServerInfo", context)
        info = server_pb.ServerInfo(version="0.1.0", api_versions=["modelpress.v1"], max_chunk_bytes=CHUNK_BYTES)
        recipe = from_dict({"version": 1, "steps": [{"fuse": {}}, {"quantize": {"scheme": "auto"}}]})
        info.presets.add(name="default", summary="Good for most.", recipe=recipe)
        info.devices.append("cpu")
        for technique in STEP.options:
            info.techniques.add(name=technique.name, summary=technique.help)
        return info

    async def GetUsage(self, request: Any, context: Any) -> server_pb.Usage:
        await self.enter("GetUsage", context)
        return server_pb.Usage(
            parent=request.parent, stored_bytes=2_000_000, blobs=3, models=1, max_models=10, runs=4, cpu_seconds=90.0,
            job_ttl_seconds=3600.0, max_requests_per_second=5.0,
        )  # fmt: skip

    async def ListUploads(self, request: Any, context: Any) -> uploads.ListUploadsResponse:
        await self.enter(f"ListUploads {request.page_token}", context)
        names = {"": ("u2", "1"), "1": ("u1", "")}
        name, token = names[request.page_token]
        upload = uploads.Upload(name=f"{request.parent}/uploads/{name}", committed_size=5)
        upload.digest.size_bytes = 10
        return uploads.ListUploadsResponse(uploads=[upload], next_page_token=token)

    async def CancelUpload(self, request: Any, context: Any) -> uploads.Upload:
        await self.enter(f"CancelUpload {request.name}", context)
        return uploads.Upload(name=request.name)

    async def check_health(self, request: bytes, context: Any) -> bytes:
        return bytes([0x08, self.script.serving])

    async def start(self) -> grpc.aio.Server:
        server = grpc.aio.server()
        uploads_grpc.add_UploadServiceServicer_to_server(self, server)
        models_grpc.add_ModelServiceServicer_to_server(self, server)
        jobs_grpc.add_JobServiceServicer_to_server(self, server)
        server_grpc.add_ServerServiceServicer_to_server(self, server)
        check = grpc.unary_unary_rpc_method_handler(self.check_health)
        server.add_generic_rpc_handlers(
            [grpc.method_handlers_generic_handler("grpc.health.v1.Health", {"Check": check})]
        )
        self.address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
        await server.start()
        return server


def ignore_shared_poller(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    """grpc.aio has one poller for all loops of a process."""
    if not isinstance(context.get("exception"), BlockingIOError):
        loop.default_exception_handler(context)


@pytest.fixture
def fake_server() -> Iterator[FakeServer]:
    """A running server."""
    fake = FakeServer()  # type: ignore[abstract]  # the client does not call every method
    loop = asyncio.new_event_loop()
    loop.set_exception_handler(ignore_shared_poller)
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    server = asyncio.run_coroutine_threadsafe(fake.start(), loop).result(60)
    yield fake
    asyncio.run_coroutine_threadsafe(server.stop(0), loop).result(60)
    loop.call_soon_threadsafe(loop.stop)
    thread.join()
    loop.close()


@pytest.fixture(scope="session")
def patient() -> RetryPolicy:
    """Tries again at once; its limits are those that a busy machine does not reach."""
    return RetryPolicy(
        connect_timeout_s=120,
        call_timeout_s=120,
        idle_timeout_s=120,
        watch_idle_timeout_s=120,
        give_up_s=240,
        initial_backoff_s=0.01,
        max_backoff_s=0.05,
    )


@dataclass(frozen=True)
class Ran:
    """How a command ended."""

    code: int
    out: str
    err: str

    @property
    def document(self) -> Any:
        """stdout as the one JSON document."""
        return json.loads(self.out)


@pytest.fixture
def run_cli(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., Ran]:
    """Runs compress-client in this process, in an empty folder."""
    from modelpress_client.cli import main

    monkeypatch.chdir(tmp_path)
    for name in ("COMPRESS_SERVER", "COMPRESS_TOKEN"):
        monkeypatch.delenv(name, raising=False)

    def run(*arguments: object) -> Ran:
        with pytest.raises(SystemExit) as leaving:
            main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return Ran(leaving.value.code if isinstance(leaving.value.code, int) else 0, captured.out, captured.err)

    return run


@pytest.fixture
def model_file(tmp_path: Path) -> Path:
    """A file that starts as ONNX does: one unknown field of 300 kB behind ir_version."""
    path = tmp_path / "net.onnx"
    content = bytes(range(256)) * 1200
    length = len(content)
    varint = bytes([length & 0x7F | 0x80, length >> 7 & 0x7F | 0x80, length >> 14])
    path.write_bytes(b"\x08\x08" + bytes([14 << 3 | 2]) + varint + content)
    return path
