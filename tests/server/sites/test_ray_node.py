"""A node with real confined workers and a real bucket, asked as the servers of a cluster do; Ray carries no message."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from modelpress_protos.internal.v1 import site_pb2, worker_pb2
from modelpress_protos.v1 import common_pb2
from modelpress_server.sites.ray_node import GRACE_S, UNUSED_S, WAITS_S, Node, NodeSettings
from modelpress_server.stores.blobs import BlobKey
from modelpress_server.stores.s3 import S3BlobStore
from modelpress_server.toolchain import made_by

sys.path.insert(0, str(Path(__file__).parents[1]))
from manual_clock import ManualClock
from server_harness import until

FAKE_TASKS = str(Path(__file__).parents[1] / "executors" / "fake_tasks.py")
SERVER, OTHER, LEASE_S = "a-server", "another", 20.0


@dataclass
class Bench:
    """A node, the bucket, and a clock that stands still."""

    node: Node
    blobs: S3BlobStore
    model: BlobKey
    clock: ManualClock
    folder: Path
    events: list[worker_pb2.WorkerEvent] = field(default_factory=list)

    def assignment(self, behaviour: str) -> bytes:
        """A job that does what `fake_tasks` says."""
        task = site_pb2.Assignment(project="p", time_limit_s=600.0, growth=1)
        task.job.name = behaviour
        task.model.files.append(common_pb2.FileEntry(path="model.onnx", digest=self.model.to_digest()))
        return task.SerializeToString()

    async def ending(self, task_id: str) -> site_pb2.Ending:
        """Follows a task to its end; what it said goes to `events`."""
        seen = 0
        while True:
            answer = await self.node.news(task_id, seen)
            assert answer is not None
            news = site_pb2.News.FromString(answer)
            self.events += news.events
            seen += len(news.events)
            if news.HasField("ending"):
                return news.ending

    async def sleeps(self) -> bool:
        """Whether a task has begun to sleep."""
        return bool(await asyncio.to_thread(lambda: list(self.folder.glob("*/work/*/output/sleeps-*"))))


@pytest.fixture
async def open_node(s3: str, tmp_path: Path) -> AsyncIterator[Callable[..., Awaitable[Bench]]]:
    """Opens a node that the server SERVER has spoken to."""
    opened: list[Bench] = []

    async def start(slots: int = 1) -> Bench:
        clock, folder = ManualClock(), tmp_path / "nodes"
        settings = NodeSettings(
            blobs=s3, slots=slots, worker_start="exec", sandbox="off", worker_uid=0, reserve_bytes=0,
            max_blob_bytes=2**20, folder=folder, tasks=FAKE_TASKS,
        )  # fmt: skip
        blobs = S3BlobStore(s3, tmp_path / "tmp")
        await blobs.open()
        (tmp_path / "model.onnx").write_bytes(b"model")
        model = await blobs.ingest(tmp_path, "model.onnx", max_bytes=100)
        bench = Bench(Node(settings, "0123456789abcdef0123", clock), blobs, model, clock, folder)
        info = site_pb2.NodeInfo.FromString(await bench.node.open(SERVER, LEASE_S))
        assert info.made_by == made_by()
        opened.append(bench)
        return bench

    yield start
    for bench in opened:
        await bench.node.close()
        await bench.blobs.close()
        assert list(bench.folder.iterdir()) == []


async def test_a_task_takes_its_files_from_the_bucket_and_leaves_its_own_there(
    open_node: Callable[..., Awaitable[Bench]],
) -> None:
    """Events come in order, each once, however often they are asked for; the result names the kind of the node."""
    bench = await open_node()
    assert await bench.node.begin(SERVER, "t1", bench.assignment("describe"))
    assert await bench.node.begin(SERVER, "t1", bench.assignment("describe"))  # an answer was lost
    done = (await bench.ending("t1")).compressed
    assert done.made_by == made_by()
    (artifact,) = done.artifacts
    assert await bench.blobs.has(BlobKey.of(artifact.files[0].digest))
    stages = [event.progress.stage for event in bench.events if event.HasField("progress")]
    assert [stage for stage in stages if stage != "start_worker"] == ["stage 0.0", "stage 0.5", "stage 1.0"]
    await bench.node.forget("t1")
    assert await bench.node.news("t1", 0) is None


async def test_slots_go_to_who_asked_first(open_node: Callable[..., Awaitable[Bench]]) -> None:
    """With all slots taken others are turned away; the first of them that still asks has the next free one."""
    bench = await open_node()
    assert await bench.node.begin(SERVER, "runs", bench.assignment("sleep:1"))
    assert not await bench.node.begin(OTHER, "first", bench.assignment("describe"))
    assert not await bench.node.begin(SERVER, "second", bench.assignment("describe"))
    await bench.node.forget("runs")
    assert not await bench.node.begin(SERVER, "second", bench.assignment("describe"))
    assert await bench.node.begin(OTHER, "first", bench.assignment("describe"))
    await bench.ending("first")
    assert await bench.node.begin(SERVER, "second", bench.assignment("describe"))
    await bench.ending("second")
    # One that was turned away and asks no longer holds nobody up.
    assert await bench.node.begin(SERVER, "runs again", bench.assignment("sleep:1"))
    assert not await bench.node.begin(OTHER, "gives up", bench.assignment("describe"))
    await bench.node.forget("runs again")
    bench.clock.advance(WAITS_S)
    assert await bench.node.begin(SERVER, "third", bench.assignment("describe"))


async def test_tasks_of_a_dead_server_are_stopped(open_node: Callable[..., Awaitable[Bench]]) -> None:
    """A server that was not heard of for its lease has nothing running here any more; others keep theirs."""
    bench = await open_node(slots=2)
    await bench.node.beat(OTHER, 2 * LEASE_S, [])
    assert await bench.node.begin(SERVER, "lost", bench.assignment("sleep:600"))
    assert await bench.node.begin(OTHER, "kept", bench.assignment("sleep:600"))
    await until(bench.sleeps)
    bench.clock.advance(LEASE_S / 2)
    await bench.node.beat(SERVER, LEASE_S, ["lost"])
    bench.clock.advance(LEASE_S + 1)

    async def is_gone() -> bool:
        bench.clock.advance(0.01)
        return "lost" not in bench.node.tasks

    await until(is_gone)
    assert bench.node.tasks == ["kept"]


async def test_a_task_that_nobody_follows_is_stopped(open_node: Callable[..., Awaitable[Bench]]) -> None:
    """A server that had given the node up, and comes back, has begun it elsewhere; it does not keep a slot here."""
    bench = await open_node(slots=2)
    for task_id in ("given up", "followed"):
        assert await bench.node.begin(SERVER, task_id, bench.assignment("sleep:600"))
    await until(bench.sleeps)
    await bench.node.beat(SERVER, LEASE_S, [])
    assert bench.node.tasks == ["given up", "followed"]  # they may be younger than the list
    bench.clock.advance(GRACE_S + 1)
    await bench.node.beat(SERVER, LEASE_S, ["followed"])
    assert bench.node.tasks == ["followed"]


async def test_a_failing_task_fails_alone(open_node: Callable[..., Awaitable[Bench]]) -> None:
    """A worker that crashes is the task's loss, and the node has its slot again."""
    bench = await open_node()
    assert await bench.node.begin(SERVER, "crashes", bench.assignment("crash:SIGSEGV"))
    lost = (await bench.ending("crashes")).lost
    assert (lost.reason, lost.own) == ("WORKER_CRASHED", True)
    assert await bench.node.begin(SERVER, "runs", bench.assignment("describe"))
    assert (await bench.ending("runs")).HasField("compressed")


async def test_an_unused_node_ends(open_node: Callable[..., Awaitable[Bench]], monkeypatch: pytest.MonkeyPatch) -> None:
    """With no server left that speaks to it, a node goes, and its folder with it."""
    bench = await open_node()
    exits: list[int] = []
    monkeypatch.setattr("modelpress_server.sites.ray_node.os._exit", exits.append)
    bench.clock.advance(LEASE_S + 1)

    async def has_ended() -> bool:
        bench.clock.advance(UNUSED_S / 100)
        return exits == [0]

    await until(has_ended)
