"""What a worker does with its one task: inspect a model, or compress it, with the engine."""

from __future__ import annotations

import contextlib
import os
import pkgutil
from collections.abc import Iterator, Sequence
from dataclasses import replace
from importlib import import_module
from pathlib import Path

import modelpress_compression
import threadpoolctl
from modelpress_compression.errors import CompressionError, InvalidInputsError, RejectedModelError
from modelpress_compression.inputs import EvaluationData, InputData, specs_of
from modelpress_compression.inspection import inspect_model
from modelpress_compression.loaders import load
from modelpress_compression.loaders.formats import detect
from modelpress_compression.memory import Memory
from modelpress_compression.model import Model, Provenance
from modelpress_compression.pipeline import Result, compress, stages_of
from modelpress_protos.internal.v1 import worker_pb2
from modelpress_protos.v1 import model_service_pb2

from modelpress_server.sandbox.confinement import LEVEL_FILES_AND_NETWORK
from modelpress_server.worker import messages
from modelpress_server.worker.context import TaskContext
from modelpress_server.worker.spans import Spans

# What numpy, torch and onnxscript load only when they are first used so; found by comparing sys.modules around jobs.
_LAZY = (
    "numpy.ma",
    "onnxscript.function_libs.torch_lib.ops",
    "onnxscript.optimizer",
    "onnxscript.rewriter.onnx_fusions",
    "sympy.combinatorics",
    "torch._dynamo",
    "torch._export.converter",
    "torch._subclasses.schema_check_mode",
    "torch.export",
    "torch.jit",
    "torch.onnx",
)


_BACKENDS = "modelpress_compression.backends."
# Its library starts threads when it is imported, and no worker could be forked beside them: see `worker.zygote`.
_WITH_THREADS = ("modelpress_compression.backends.openvino",)


def preload() -> Iterator[None]:
    """Imports what a task may touch beside what this module needs itself, a library or module at each step.

    Raises ModuleNotFoundError."""
    for module in pkgutil.walk_packages(modelpress_compression.__path__, "modelpress_compression."):
        if module.name.startswith(_WITH_THREADS):
            continue
        try:
            import_module(module.name)
        except ModuleNotFoundError as error:
            # A backend whose library is an extra that is not installed; whatever else is lacking is a fault.
            if not module.name.startswith(_BACKENDS) or (error.name or "").startswith("modelpress_"):
                raise
        yield
    for name in _LAZY:
        # Another version may have it elsewhere: then a task pays for its import, and nothing else is lost.
        with contextlib.suppress(ImportError):
            import_module(name)
        yield


def run(request: worker_pb2.WorkerRequest, context: TaskContext) -> worker_pb2.WorkerEvent:
    """The terminal event of a task that went well. Raises CompressionError, and whatever a bug raises."""
    _start_threads()
    if request.WhichOneof("task") == "inspect":
        return _inspect(request.inspect, context)
    if request.WhichOneof("task") == "compress":
        return _compress(request.compress, context)
    raise ValueError("the request holds no task that this worker knows; server and worker differ in version")


def _start_threads() -> None:
    """Has numpy compute on all cores: at its import it was told to start no threads (`executors.process`)."""
    threadpoolctl.threadpool_limits(len(os.sched_getaffinity(0)), user_api="blas")


def _inspect(task: worker_pb2.InspectTask, context: TaskContext) -> worker_pb2.WorkerEvent:
    context.events.progress("load", 0, 1, 0.0, "loading the model")
    return worker_pb2.WorkerEvent(inspected=_found(task.model, _load(task.model, context)))


def _found(files: worker_pb2.ModelFiles, model: Model) -> worker_pb2.InspectResult:
    return worker_pb2.InspectResult(
        format=messages.format_to_proto(detect(_paths(files)[0]).name),
        inspection=messages.inspection_to_proto(inspect_model(model)),
    )


def _compress(task: worker_pb2.CompressTask, context: TaskContext) -> worker_pb2.WorkerEvent:
    began = context.clock()
    recipe = messages.recipe_from_proto(task.recipe)
    context.events.progress("load", 0, len(stages_of(recipe)), 0.0, "loading the model")
    model = _load(task.model, context, task.data_path or task.eval_path)
    found = _found(task.model, model)
    _refuse_blocking(found.inspection)
    context.events.send(worker_pb2.WorkerEvent(loaded=found))
    data = InputData.read(task.data_path, model.inputs, context.directory) if task.data_path else None
    eval_data = EvaluationData.read(task.eval_path, model.inputs, context.directory) if task.eval_path else None
    result = compress(
        model,
        recipe,
        data=data,
        eval_data=eval_data,
        on_progress=context.events.progress,
        on_log=context.events.log,
        job=task.job,
        time_limit_s=_time_left_s(task.time_limit_s, context.clock() - began),
        work_directory=context.directory,
        clock=context.clock,
        alone=context.alone,
        memory_limit_bytes=task.memory_limit_bytes or None,
        memory=_memory(task),
        span=Spans(context.events).span if task.traced else None,
    )
    return worker_pb2.WorkerEvent(compressed=_write(result, Path(task.output_directory)))


def _memory(task: worker_pb2.CompressTask) -> Memory | None:
    """What earlier jobs of the project have found out about this model and data, and room for more."""
    if not task.findings_bytes:
        return None
    return Memory(Path(task.found_directory), task.findings_bytes, earlier=Path(task.known_directory))


def _refuse_blocking(inspection: model_service_pb2.Inspection) -> None:
    for finding in inspection.findings:
        if finding.severity == model_service_pb2.Finding.SEVERITY_BLOCKING:
            raise RejectedModelError(finding.detail, finding=finding.code)


def _write(result: Result, directory: Path) -> worker_pb2.CompressResult:
    message = worker_pb2.CompressResult(summary=messages.summary_from_report(result.report))
    for artifact in result.write(directory):
        names = [path.relative_to(directory).as_posix() for path in artifact.files]
        message.artifacts.add(kind=messages.kind_to_proto(artifact.kind), paths=names, candidate=artifact.candidate)
    return message


def _load(files: worker_pb2.ModelFiles, context: TaskContext, data_path: str = "") -> Model:
    """`data_path`: samples, which tell what the inputs are where neither the file nor the user does."""
    paths = _paths(files)
    if context.sandbox.mode == "require" and context.sandbox.level < LEVEL_FILES_AND_NETWORK:
        _refuse_code(paths)
    inputs = [messages.spec_from_proto(spec) for spec in files.input_hints]
    provenance = messages.provenance_from_proto(files.source) if files.HasField("source") else None
    try:
        return load(paths, inputs, provenance=provenance)
    except InvalidInputsError:
        model = _load_for(data_path, paths, provenance, context.directory) if data_path and not inputs else None
        if model is None:
            raise
        return model


def _load_for(data_path: str, paths: Sequence[Path], provenance: Provenance | None, directory: Path) -> Model | None:
    """The model with the inputs that the samples are for; None where it is not for them."""
    try:
        specs = specs_of(data_path, directory)
    except CompressionError:
        return None
    # NumPy's floats are of 64 bits where nobody asks for others, a network's hardly ever.
    narrow = [replace(spec, dtype="float32") if spec.dtype == "float64" else spec for spec in specs]
    for tried in (specs, narrow):
        with contextlib.suppress(CompressionError):
            listed = ", ".join(map(str, tried))
            return load(paths, tried, provenance=provenance).with_warnings(
                f"The file does not record its inputs; they were taken from the data: {listed}. Give --input where "
                "other dimensions vary."
            )
    return None


def _refuse_code(paths: Sequence[Path]) -> None:
    row = detect(paths[0])
    if row.loader and row.carries_code:
        raise RejectedModelError(
            f"This server reads files with code in them ({row.name}) only in a sandbox that its kernel does not "
            "offer. Export the model to ONNX, or use a server with Landlock and seccomp.",
            finding="SANDBOX_REQUIRED",
        )


def _paths(files: worker_pb2.ModelFiles) -> list[Path]:
    return [Path(files.directory) / path for path in files.paths]


def _time_left_s(limit_s: float, used_s: float) -> float | None:
    """What is left for the engine, a little less than the server's own limit: its error says more than being killed."""
    if limit_s <= 0:
        return None
    reserve_s = min(2.0, limit_s * 0.05)
    return max(0.0, limit_s - reserve_s - used_s)
