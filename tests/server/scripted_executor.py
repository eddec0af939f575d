"""An Executor that does what the first bytes of the model say, without any child process."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable
from pathlib import Path

import grpc
from google.rpc import status_pb2
from modelpress_protos.internal.v1 import worker_pb2
from modelpress_protos.v1 import common_pb2, job_service_pb2, model_service_pb2
from modelpress_server.errors import make_status
from modelpress_server.executors.base import START_WORKER, Figures, Limits, WorkerLostError, WorkerUnavailableError


class ScriptedExecutor:
    """The main model file is JSON: `inspect` and `compress` name behaviours; see the methods below."""

    sandbox_level = 2
    separate_users = False

    def __init__(self) -> None:
        self.started: list[str] = []
        self.killed: list[str] = []
        self.limits: list[Limits] = []
        self.broken = False  # no worker can be started
        self.raises: list[Exception] = []  # what the next runs end with
        self.gate = asyncio.Event()  # behaviour "wait" goes on when it is set
        self.running = asyncio.Event()
        self.known: list[dict[str, bytes]] = []  # what compressions were given of earlier findings
        self.leave: Callable[[Path], None] = lambda folder: None  # what each leaves in the folder for its own
        self.report = ""  # report.html, where there is to be one
        self.report_json: dict[str, object] = {}  # what report.json holds besides
        self.inspecting: list[dict[str, str]] = []  # what inspections were of, in order
        self.inspection_gate = asyncio.Event()
        self.inspection_gate.set()
        self.worker_gate = asyncio.Event()  # an inspection has its worker when it is set
        self.worker_gate.set()
        self.tell_late: Callable[[], None] = lambda: (
            None
        )  # progress of the last inspection, whether it has ended or not

    def figures(self) -> Figures:
        return Figures(starts=len(self.started))

    async def start(self) -> None:
        """Nothing to get ready."""

    async def try_start(self) -> None:
        if self.broken:
            raise WorkerUnavailableError("No worker.")

    async def close(self) -> None:
        """Nothing to kill."""

    async def run(
        self,
        request: worker_pb2.WorkerRequest,
        *,
        limits: Limits,
        on_event: Callable[[worker_pb2.WorkerEvent], None],
    ) -> worker_pb2.WorkerEvent:
        self.limits.append(limits)
        await self.try_start()
        if request.HasField("inspect"):
            self.inspecting.append(script_of(request.inspect.model))
            _tell_stage(on_event, START_WORKER)
            await self.worker_gate.wait()
            _tell_stage(on_event, "load")
            await self.inspection_gate.wait()
        if self.raises:
            raise self.raises.pop(0)
        if request.HasField("inspect"):
            self.tell_late = lambda: _tell_stage(on_event, "load")
            return self._inspect(request.inspect)
        self.started.append(request.compress.job)
        self.running.set()
        try:
            event = await self._compress(request.compress, on_event)
            on_event(worker_pb2.WorkerEvent(used=worker_pb2.Used(cpu_seconds=2.5, run_seconds=1.5)))
            return event
        except asyncio.CancelledError:
            self.killed.append(request.compress.job)
            raise

    def _inspect(self, task: worker_pb2.InspectTask) -> worker_pb2.WorkerEvent:
        behaviour = script_of(task.model).get("inspect", "ok")
        if behaviour == "refuse":
            return worker_pb2.WorkerEvent(failed=refusal())
        if behaviour == "blocking":
            finding = model_service_pb2.Finding(
                severity=model_service_pb2.Finding.SEVERITY_BLOCKING, code="PICKLE_GLOBAL", detail="It runs os.system."
            )
            result = worker_pb2.InspectResult(inspection=model_service_pb2.Inspection(findings=[finding]))
            return worker_pb2.WorkerEvent(inspected=result)
        if behaviour == "timeout":
            raise WorkerLostError("WORKER_TIMEOUT", "The worker ran past its time limit of 300 s.")
        return worker_pb2.WorkerEvent(inspected=found())

    async def _compress(
        self, task: worker_pb2.CompressTask, on_event: Callable[[worker_pb2.WorkerEvent], None]
    ) -> worker_pb2.WorkerEvent:
        behaviour = script_of(task.model).get("compress", "ok")
        on_event(worker_pb2.WorkerEvent(log=worker_pb2.LogLine(severity="INFO", text=f"start {behaviour}\x07")))
        progress = job_service_pb2.Progress(stage="load", stage_index=0, stage_count=2, fraction=0.5)
        on_event(worker_pb2.WorkerEvent(progress=progress))
        if task.traced:
            _tell_parts(on_event)
        if script_of(task.model).get("inspect", "ok") == "ok":
            on_event(worker_pb2.WorkerEvent(loaded=found()))
        progress = job_service_pb2.Progress(stage="quantize", stage_index=1, stage_count=2, fraction=0.25)
        on_event(worker_pb2.WorkerEvent(progress=progress))
        self._look_around(task)
        if behaviour == "wait":
            on_event(worker_pb2.WorkerEvent(used=worker_pb2.Used(cpu_seconds=1.0, run_seconds=1.0)))
            await self.gate.wait()
        elif behaviour == "crash" or (behaviour == "crash_once" and len(self.started) == 1):
            raise WorkerLostError("WORKER_CRASHED", "The worker was killed by signal 11.")
        elif behaviour == "memory":
            raise WorkerLostError("WORKER_OUT_OF_MEMORY", "The worker hit its memory limit.")
        elif behaviour == "fail":
            return worker_pb2.WorkerEvent(failed=refusal())
        elif behaviour == "bug":
            raise RuntimeError("secret path /home/somebody")
        return worker_pb2.WorkerEvent(compressed=self._produce(task, behaviour))

    def _look_around(self, task: worker_pb2.CompressTask) -> None:
        self.known.append({path.name: path.read_bytes() for path in Path(task.known_directory).iterdir()})
        self.leave(Path(task.found_directory))

    def _produce(self, task: worker_pb2.CompressTask, behaviour: str) -> worker_pb2.CompressResult:
        output = Path(task.output_directory)
        model = output / "model.onnx"
        if behaviour == "symlink":
            model.symlink_to("/etc/passwd")
        else:
            model.write_bytes(b"small")
        data = Path(task.data_path).read_bytes().hex() if task.data_path else None
        (output / "report.json").write_text(json.dumps({"job": task.job, "data": data, **self.report_json}))
        kinds = job_service_pb2.Artifact
        artifacts = [
            worker_pb2.ProducedArtifact(kind=kinds.KIND_OPTIMIZED_MODEL, paths=["model.onnx"]),
            worker_pb2.ProducedArtifact(kind=kinds.KIND_REPORT_JSON, paths=["report.json"]),
        ]
        if self.report:
            (output / "report.html").write_text(self.report)
            artifacts.append(worker_pb2.ProducedArtifact(kind=kinds.KIND_REPORT_HTML, paths=["report.html"]))
        return worker_pb2.CompressResult(
            artifacts=artifacts,
            summary=job_service_pb2.ReportSummary(original_size_bytes=100, optimized_size_bytes=5),
        )


def _tell_stage(on_event: Callable[[worker_pb2.WorkerEvent], None], stage: str) -> None:
    on_event(worker_pb2.WorkerEvent(progress=job_service_pb2.Progress(stage=stage)))


def _tell_parts(on_event: Callable[[worker_pb2.WorkerEvent], None]) -> None:
    """A pass within a candidate, a part that lies about its time, and one that never ends."""
    now_us = time.time_ns() // 1000
    for part in (
        worker_pb2.Span(id=1, kind="candidate", name="prune 10%", time_us=now_us),
        worker_pb2.Span(id=2, parent=1, kind="pass", name="prune", time_us=now_us),
        worker_pb2.Span(id=2, ended=True, failed=True, time_us=now_us),
        worker_pb2.Span(id=1, ended=True, time_us=now_us),
        worker_pb2.Span(id=3, parent=99, kind="pass", name="liar", time_us=-(2**60)),
        worker_pb2.Span(id=3, ended=True, time_us=2**60),
        worker_pb2.Span(id=4, kind="candidate", name="endless", time_us=now_us),
        worker_pb2.Span(id=5, ended=True),
    ):
        on_event(worker_pb2.WorkerEvent(span=part))


def script_of(model: worker_pb2.ModelFiles) -> dict[str, str]:
    """What the main file asks for."""
    script: dict[str, str] = json.loads((Path(model.directory) / model.paths[0]).read_bytes())
    return script


def refusal() -> status_pb2.Status:
    """What a worker says of a file that it cannot read."""
    return make_status(grpc.StatusCode.INVALID_ARGUMENT, "UNSUPPORTED_FORMAT", "It is no format that we read.")


def found() -> worker_pb2.InspectResult:
    """What an honest worker finds in every model."""
    inspection = model_service_pb2.Inspection(parameter_count=7, opset=21, op_counts={"Conv": 2})
    return worker_pb2.InspectResult(format=common_pb2.MODEL_FORMAT_ONNX, inspection=inspection)
