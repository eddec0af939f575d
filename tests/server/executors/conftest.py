"""Real worker processes that run the tasks of fake_tasks.py."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from modelpress_protos.internal.v1 import worker_pb2
from modelpress_server.clock import Clock
from modelpress_server.executors.base import Limits
from modelpress_server.executors.local import LocalExecutor

FAKE_TASKS = str(Path(__file__).with_name("fake_tasks.py"))
GENEROUS = Limits(time_s=600.0, memory_bytes=0)


@dataclass
class Bench:
    """An executor and one task folder below its root."""

    executor: LocalExecutor
    root: Path
    events: list[worker_pb2.WorkerEvent] = field(default_factory=list)

    @property
    def output(self) -> Path:
        """Where the task writes."""
        return self.root / "task" / "output"

    @property
    def lines(self) -> list[str]:
        """Texts of the log lines so far."""
        return [event.log.text for event in self.events if event.WhichOneof("event") == "log"]

    def sleepers(self) -> list[int]:
        """Processes of the tasks that have begun to sleep."""
        return [int(path.name.removeprefix("sleeps-")) for path in self.output.glob("sleeps-*")]

    async def run(self, job: str, limits: Limits = GENEROUS, model_content: bytes = b"model") -> worker_pb2.WorkerEvent:
        """Runs the behaviour that `job` names."""
        model = self.root / "task" / "model"
        model.mkdir(parents=True, exist_ok=True)
        (model / "model.onnx").write_bytes(model_content)
        self.output.mkdir(exist_ok=True)
        task = worker_pb2.CompressTask(job=job, output_directory=str(self.output))
        task.model.directory = str(model)
        task.model.paths.append("model.onnx")
        request = worker_pb2.WorkerRequest(compress=task)
        return await self.executor.run(request, limits=limits, on_event=self.events.append)

    async def answer(self, job: str) -> Any:
        """What the behaviour found out."""
        event = await self.run(job)
        assert event.WhichOneof("event") == "compressed", event
        return json.loads((self.output / "answer.json").read_text("utf-8"))


StartBench = Callable[..., Awaitable[Bench]]


@pytest.fixture
async def start_bench(tmp_path: Path) -> AsyncIterator[StartBench]:
    """Starts executors; closes them in the end and checks that they left no process folder."""
    started: list[Bench] = []

    async def start(
        *,
        fork: bool = False,
        sandbox: str = "off",
        tasks: str = FAKE_TASKS,
        clock: Clock | None = None,
        root: Path | None = None,
        **options: Any,
    ) -> Bench:
        root = root or tmp_path / f"work-{len(started)}"
        executor = LocalExecutor(fork=fork, sandbox=sandbox, temp_root=root, tasks=tasks, clock=clock, **options)
        bench = Bench(executor, root)
        await bench.executor.start()
        started.append(bench)
        return bench

    yield start
    for bench in started:
        await bench.executor.close()
        assert list(bench.root.glob("worker-*")) == []
