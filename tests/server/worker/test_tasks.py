"""Real workers with the real engine, confined as far as this kernel allows."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator
from pathlib import Path

import numpy as np
import pytest
import pytest_asyncio
from google.rpc import error_details_pb2
from modelpress_compression.specs import TensorSpec
from modelpress_protos import recipe as recipe_language
from modelpress_protos.internal.v1 import worker_pb2
from modelpress_protos.v1 import common_pb2, job_service_pb2
from modelpress_server.executors.base import Limits
from modelpress_server.executors.local import LocalExecutor
from modelpress_server.worker.messages import spec_to_proto

MNIST = Path(__file__).parents[3] / "examples" / "mnist"
INPUT = spec_to_proto(TensorSpec.parse("x:float32[batch,1,28,28]"))
LIMITS = Limits(time_s=120.0, memory_bytes=8 * 1024**3)


IN_THE_LOOP_OF_THE_EXECUTOR = pytest.mark.asyncio(loop_scope="module")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where tasks have their files."""
    return tmp_path_factory.mktemp("tasks")


@pytest.fixture
def place(root: Path) -> Path:
    """A folder there for one test."""
    return Path(tempfile.mkdtemp(dir=root))


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def executor(root: Path) -> AsyncIterator[LocalExecutor]:
    """One as the server has it: workers are forked, here for all tests from one process that has loaded the engine."""
    made = LocalExecutor(fork=True, sandbox="auto", temp_root=root)
    await made.start()
    yield made
    await made.close()


# What each of two libraries is missed by, in one process: its imports take seconds. What tasks load later is left out.
LACKING = """
import sys

def missed():
    try:
        from modelpress_server.worker import tasks
        tasks._LAZY = ()
        for _ in tasks.preload():
            pass
    except ModuleNotFoundError as error:
        return error.name
    return "none"

for name in ("onnxruntime", "openvino"):
    sys.modules[name] = None
    print(f"{name}: {missed()}")
    del sys.modules[name]
"""


def lay_out(root: Path, name: str, *, hints: bool = False) -> worker_pb2.ModelFiles:
    """The model of the MNIST example in a task's folder."""
    folder = root / "task" / "model"
    folder.mkdir(parents=True)
    shutil.copy(MNIST / name, folder / "model")
    return worker_pb2.ModelFiles(directory=str(folder), paths=["model"], input_hints=[INPUT] if hints else [])


def info_of(event: worker_pb2.WorkerEvent) -> error_details_pb2.ErrorInfo:
    """Why a task failed."""
    info = error_details_pb2.ErrorInfo()
    assert event.WhichOneof("event") == "failed", event
    assert event.failed.details[0].Unpack(info)
    return info


@pytest.mark.parametrize(
    ("name", "model_format"),
    [
        ("model.onnx", common_pb2.MODEL_FORMAT_ONNX),
        ("model_scripted.pt", common_pb2.MODEL_FORMAT_TORCHSCRIPT),
        ("model.pt2", common_pb2.MODEL_FORMAT_TORCH_EXPORT),
    ],
)
@IN_THE_LOOP_OF_THE_EXECUTOR
async def test_inspecting(executor: LocalExecutor, place: Path, name: str, model_format: int) -> None:
    """Every format that the server reads is inspected inside the sandbox."""
    files = lay_out(place, name, hints=name.endswith(".pt"))
    request = worker_pb2.WorkerRequest(inspect=worker_pb2.InspectTask(model=files))
    event = await executor.run(request, limits=LIMITS, on_event=lambda _: None)
    assert event.WhichOneof("event") == "inspected", event
    assert event.inspected.format == model_format
    assert event.inspected.inspection.op_counts["Conv"] == 2


@IN_THE_LOOP_OF_THE_EXECUTOR
async def test_compressing(executor: LocalExecutor, place: Path) -> None:
    """A compression with data leaves its artifacts in the output folder, tells its stages, and sums up its report."""
    files = lay_out(place, "model.onnx")
    output = place / "task" / "output"
    output.mkdir()
    for name in ("samples.npz", "eval.npz"):
        shutil.copy(MNIST / name, place / "task" / name)
    recipe = recipe_language.from_dict({"version": 1, "steps": [{"fuse": {}}], "benchmark": {"rounds": 5}})
    task = worker_pb2.CompressTask(
        job="projects/default/jobs/j1",
        model=files,
        recipe=recipe,
        data_path=str(place / "task" / "samples.npz"),
        eval_path=str(place / "task" / "eval.npz"),
        output_directory=str(output),
        time_limit_s=60.0,
    )
    events: list[worker_pb2.WorkerEvent] = []
    request = worker_pb2.WorkerRequest(compress=task)
    event = await executor.run(request, limits=LIMITS, on_event=events.append)
    assert event.WhichOneof("event") == "compressed", event
    kinds = job_service_pb2.Artifact.Kind
    assert {(item.kind, *item.paths) for item in event.compressed.artifacts} == {
        (kinds.KIND_OPTIMIZED_MODEL, "model.onnx"),
        (kinds.KIND_REPORT_JSON, "report.json"),
        (kinds.KIND_REPORT_HTML, "report.html"),
    }
    report = json.loads((output / "report.json").read_text("utf-8"))
    assert report["job"] == task.job
    assert report["accuracy"]["samples"] > 0
    assert event.compressed.summary.optimized_size_bytes == (output / "model.onnx").stat().st_size
    fractions = [item.progress.fraction for item in events if item.WhichOneof("event") == "progress"]
    assert fractions == sorted(fractions)
    assert fractions[-1] == 1.0


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@IN_THE_LOOP_OF_THE_EXECUTOR
async def test_data_tell_what_inputs_are(executor: LocalExecutor, place: Path, dtype: str) -> None:
    """A file that records none, and samples: their names, types and dimensions are those of the inputs, which is said;
    what stands beside samples for a metric is no input. NumPy's own floats are taken for the network's."""
    files = lay_out(place, "model_traced.pt")
    output = place / "task" / "output"
    output.mkdir()
    with np.load(MNIST / "eval.npz") as arrays:
        samples = {"x": arrays["x"].astype(dtype), "labels": arrays["labels"]}
    np.savez(place / "task" / "eval.npz", **samples)
    recipe = recipe_language.from_dict({"version": 1, "steps": [{"fuse": {}}], "benchmark": {"rounds": 5}})
    eval_path = str(place / "task" / "eval.npz")
    task = worker_pb2.CompressTask(model=files, recipe=recipe, eval_path=eval_path, output_directory=str(output))
    event = await executor.run(worker_pb2.WorkerRequest(compress=task), limits=LIMITS, on_event=lambda _: None)
    assert event.WhichOneof("event") == "compressed", event
    report = json.loads((output / "report.json").read_text("utf-8"))
    assert any("taken from the data: x:float32[batch,1,28,28]." in warning for warning in report["warnings"])
    assert report["accuracy"]["original"] > 0.97


@pytest.mark.parametrize(
    ("name", "hints", "reason"),
    [
        ("model_scripted.pt", False, "INVALID_INPUTS"),
        ("samples.npz", False, "UNSUPPORTED_FORMAT"),
    ],
)
@IN_THE_LOOP_OF_THE_EXECUTOR
async def test_what_the_user_can_mend(
    executor: LocalExecutor, place: Path, name: str, hints: bool, reason: str
) -> None:
    """Errors of the engine arrive with their reason; no path of this machine is in them."""
    request = worker_pb2.WorkerRequest(inspect=worker_pb2.InspectTask(model=lay_out(place, name, hints=hints)))
    event = await executor.run(request, limits=LIMITS, on_event=lambda _: None)
    assert info_of(event).reason == reason
    assert str(place) not in str(event)


async def test_code_without_a_sandbox_is_refused_where_one_is_required(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`require` on a kernel without Landlock refuses TorchScript, and still reads ONNX."""
    from modelpress_compression.errors import RejectedModelError
    from modelpress_server.sandbox.confinement import Sandbox
    from modelpress_server.worker.context import TaskContext
    from modelpress_server.worker.events import Events
    from modelpress_server.worker.own_time import OwnClock
    from modelpress_server.worker.paths import Redactor
    from modelpress_server.worker.tasks import run

    with (tmp_path / "events").open("wb") as pipe:
        sandbox = Sandbox("require", level=1)
        context = TaskContext(Events(pipe, Redactor([])), sandbox, tmp_path, pipe, OwnClock(tmp_path))
        files = lay_out(tmp_path, "model_scripted.pt", hints=True)
        with pytest.raises(RejectedModelError, match="sandbox") as caught:
            run(worker_pb2.WorkerRequest(inspect=worker_pb2.InspectTask(model=files)), context)
        assert caught.value.metadata["finding"] == "SANDBOX_REQUIRED"
        shutil.copy(MNIST / "model.onnx", Path(files.directory) / "model")
        event = run(worker_pb2.WorkerRequest(inspect=worker_pb2.InspectTask(model=files)), context)
        assert event.inspected.format == common_pb2.MODEL_FORMAT_ONNX


def test_a_worker_starts_without_the_libraries_of_extras() -> None:
    """A backend's library need not be installed; what the engine itself needs must be."""
    run = subprocess.run([sys.executable, "-c", LACKING], capture_output=True, text=True, check=False)
    assert run.stdout.split() == ["onnxruntime:", "onnxruntime", "openvino:", "none"], run.stderr
