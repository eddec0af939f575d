"""What workers do in a campaign: little, at times that vary, so that they are met in every state."""

from __future__ import annotations

import hashlib
import json
import random
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from modelpress_protos.internal.v1 import worker_pb2
from modelpress_protos.v1 import common_pb2, job_service_pb2, model_service_pb2
from modelpress_server.worker.context import TaskContext

BROKEN = "workers-cannot-start"


def result_of(model: bytes) -> bytes:
    """The result that a compression of these bytes must have."""
    return hashlib.sha256(model).hexdigest().encode() * (len(model) // 256 + 1)


def preload() -> Iterator[None]:
    """Nothing to import: these workers start fast."""
    yield from ()


def _refuse_while_broken() -> None:
    """Fails in a worker's process while the campaign says that workers cannot start."""
    for argument in sys.argv:
        if argument.startswith("--root=") and (Path(argument.removeprefix("--root=")).parent / BROKEN).exists():
            raise RuntimeError("this host starts no workers")


_refuse_while_broken()


def run(request: worker_pb2.WorkerRequest, context: TaskContext) -> worker_pb2.WorkerEvent:
    """Answers at some time within a fifth of a second; leaves scratch files as large as the model."""
    time.sleep(random.random() * 0.05)
    if request.HasField("inspect"):
        return worker_pb2.WorkerEvent(inspected=_found())
    task = request.compress
    model = (Path(task.model.directory) / task.model.paths[0]).read_bytes()
    context.events.send(worker_pb2.WorkerEvent(loaded=_found()))
    for step in range(3):
        context.events.progress("compress", step, 3, step / 3, "working")
        (context.directory / f"scratch-{step}").write_bytes(model)
        time.sleep(random.random() * 0.05)
    output = Path(task.output_directory)
    (output / "model.onnx").write_bytes(result_of(model))
    (output / "report.json").write_text(json.dumps({"job": task.job}), "utf-8")
    kind = job_service_pb2.Artifact
    return worker_pb2.WorkerEvent(
        compressed=worker_pb2.CompressResult(
            artifacts=[
                worker_pb2.ProducedArtifact(kind=kind.KIND_OPTIMIZED_MODEL, paths=["model.onnx"]),
                worker_pb2.ProducedArtifact(kind=kind.KIND_REPORT_JSON, paths=["report.json"]),
            ]
        )
    )


def _found() -> worker_pb2.InspectResult:
    inspection = model_service_pb2.Inspection(parameter_count=1, opset=21)
    return worker_pb2.InspectResult(format=common_pb2.MODEL_FORMAT_ONNX, inspection=inspection)
