"""What every site must do, on this machine and on a Ray cluster (slow): real confined workers, a real bucket."""

from __future__ import annotations

import asyncio
import sys
import tempfile
from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from modelpress_protos.internal.v1 import site_pb2, worker_pb2
from modelpress_protos.v1 import common_pb2
from modelpress_server.clock import Clock
from modelpress_server.executors.base import WorkerLostError
from modelpress_server.executors.local import LocalExecutor
from modelpress_server.names import new_id
from modelpress_server.observation.meter import Meter
from modelpress_server.sites.base import Postpone, PostponedError, Site, TaskFailedError
from modelpress_server.sites.machine import ThisMachine
from modelpress_server.sites.ray_cluster import RayCluster
from modelpress_server.sites.ray_node import NodeSettings
from modelpress_server.space import Space
from modelpress_server.stores.blobs import BlobKey
from modelpress_server.stores.s3 import S3BlobStore
from modelpress_server.toolchain import made_by

sys.path.insert(0, str(Path(__file__).parents[1]))
import ray_nodes
import s3_server
from server_harness import until

FAKE_TASKS = str(Path(__file__).parents[1] / "executors" / "fake_tasks.py")
GONE = BlobKey(bytes(32), 5)


@dataclass
class Bench:
    """A site, the bucket, and the folder below which tasks have theirs."""

    site: Site
    blobs: S3BlobStore
    model: BlobKey
    folder: Path
    events: list[worker_pb2.WorkerEvent] = field(default_factory=list)

    def task(self, behaviour: str = "", *, model: BlobKey | None = None, time_s: float = 600.0) -> site_pb2.Assignment:
        """A job that does what `fake_tasks` says; without, the inspection of a model."""
        task = site_pb2.Assignment(project="p", time_limit_s=time_s, growth=1)
        if behaviour:
            task.job.name = behaviour
        digest = (model or self.model).to_digest()
        task.model.files.append(common_pb2.FileEntry(path="model.onnx", digest=digest))
        return task

    async def run(self, behaviour: str, **given: float) -> site_pb2.Compressed:
        """Runs a job."""
        return await self.site.compress(self.task(behaviour, **given), self.events.append)

    async def sleeps(self) -> list[Path]:
        """What tasks that sleep have left as a sign."""
        return await asyncio.to_thread(lambda: list(self.folder.glob("**/output/sleeps-*")))


@dataclass(frozen=True)
class Cluster:
    """What is the same for all tests, so that they share the actor of the node."""

    address: str
    folder: Path
    blobs: str
    processes: ray_nodes.RayProcesses


@pytest.fixture(scope="module")
def cluster(s3_endpoint: str) -> Iterator[Cluster]:
    """A node of Ray, with the keys of the bucket."""
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="mp-nodes-", ignore_cleanup_errors=True)))
        try:
            # Confined workers read what is on Python's path.
            environment = {**s3_server.environment(s3_endpoint), "PYTHONPATH": str(Path(FAKE_TASKS).parent)}
            made = stack.enter_context(ray_nodes.ray_cluster(environment))
        except ray_nodes.NotHereError as error:
            pytest.skip(str(error))
        made.add_node("node", cpus=2)
        yield Cluster(made.address, folder, f"s3://{s3_server.BUCKET}/{new_id()}", made)


def this_machine(folder: Path, blobs: S3BlobStore) -> ThisMachine:
    executor = LocalExecutor(fork=False, sandbox="auto", temp_root=folder / "work", tasks=FAKE_TASKS)
    space = Space(folder, 0)
    return ThisMachine(
        executor, blobs, space, folder / "work", findings=None, meter=Meter(), max_blob_bytes=2**20
    )  # fmt: skip


def on_ray(folder: Path, url: str, address: str) -> RayCluster:
    settings = NodeSettings(
        blobs=url, slots=2, worker_start="exec", sandbox="auto", worker_uid=0, reserve_bytes=0, max_blob_bytes=2**20,
        folder=folder, tasks=FAKE_TASKS,
    )  # fmt: skip
    return RayCluster(
        address, settings, measure_on=None, server_id=new_id(), lease_s=20.0, clock=Clock(), meter=Meter()
    )


@pytest.fixture(params=["machine", pytest.param("ray", marks=[pytest.mark.slow, pytest.mark.timeout(600)])])
async def bench(request: pytest.FixtureRequest, s3: str, tmp_path: Path) -> AsyncIterator[Bench]:
    """Each site, with a model in the bucket."""
    shared: Cluster | None = request.getfixturevalue("cluster") if request.param == "ray" else None
    folder = shared.folder if shared else tmp_path / "site"
    folder.mkdir(exist_ok=True)
    blobs = S3BlobStore(shared.blobs if shared else s3, tmp_path / "tmp")
    await blobs.open()
    (tmp_path / "model.onnx").write_bytes(b"model")
    model = await blobs.ingest(tmp_path, "model.onnx", max_bytes=100)
    site: Site = on_ray(folder, shared.blobs, shared.address) if shared else this_machine(folder, blobs)
    await site.start()
    yield Bench(site, blobs, model, folder)
    await site.close()
    await blobs.close()


async def test_a_task_that_ends_well(bench: Bench) -> None:
    """Its events come in order, once each; its files are in the bucket; the kind of the machine is told."""
    done = await bench.run("describe")
    assert done.made_by == made_by()
    assert set(bench.site.kinds()) == {made_by()}
    (artifact,) = done.artifacts
    assert await bench.blobs.has(BlobKey.of(artifact.files[0].digest))
    stages = [event.progress.stage for event in bench.events if event.HasField("progress")]
    assert [stage for stage in stages if stage != "start_worker"] == ["stage 0.0", "stage 0.5", "stage 1.0"]
    assert sum(event.used.run_seconds for event in bench.events if event.HasField("used")) > 0


async def test_workers_are_confined(bench: Bench, tmp_path: Path) -> None:
    """As far as this kernel allows, and they see nothing of the keys of the bucket."""
    done = await bench.run("describe")
    (entry,) = done.artifacts[0].files
    target = tmp_path / "answer.json"
    await bench.blobs.place(BlobKey.of(entry.digest), target, link=False)
    answer = target.read_text("utf-8")
    assert f'"level": {bench.site.sandbox_level}' in answer
    assert "AWS_" not in answer


async def test_limits_hold(bench: Bench) -> None:
    """A task that takes too long is lost by its own doing."""
    with pytest.raises(WorkerLostError) as lost:
        await bench.run("sleep:600", time_s=1.0)
    assert (lost.value.reason, lost.value.own) == ("WORKER_TIMEOUT", True)


async def test_failures(bench: Bench) -> None:
    """A crash is the worker's, a bug an incident, a model whose file is gone waits."""
    with pytest.raises(WorkerLostError) as lost:
        await bench.run("crash:SIGSEGV")
    assert lost.value.reason == "WORKER_CRASHED"
    with pytest.raises(TaskFailedError):
        await bench.run("bug")
    with pytest.raises(PostponedError) as postponed:
        await bench.site.inspect(bench.task(model=GONE), bench.events.append)
    assert postponed.value.why is Postpone.DAMAGE


async def test_cancelling_kills_the_worker(bench: Bench) -> None:
    """And its folder goes; the place is free for the next task."""
    run = asyncio.create_task(bench.run("sleep:600"))
    (sign,) = await until(bench.sleeps)
    run.cancel()
    with pytest.raises(asyncio.CancelledError):
        await run
    pid = int(sign.name.removeprefix("sleeps-"))
    await until(lambda: not Path(f"/proc/{pid}").exists())
    assert await bench.sleeps() == []
    assert (await bench.run("describe")).artifacts


async def test_tasks_side_by_side(bench: Bench) -> None:
    """Several run at a time, and what each says reaches its own caller alone."""
    first, second = [], []
    tasks = [bench.task("describe"), bench.task("describe")]
    await asyncio.gather(bench.site.compress(tasks[0], first.append), bench.site.compress(tasks[1], second.append))
    for events in (first, second):
        assert [event.progress.stage for event in events if event.HasField("progress")][-1] == "stage 1.0"
        assert sum(event.HasField("progress") and event.progress.stage == "stage 0.0" for event in events) == 1


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("bench", ["ray"], indirect=True)
async def test_a_connection_that_is_cut(bench: Bench, cluster: Cluster) -> None:
    """The task goes on meanwhile, and the server follows it to the end that it has by itself."""
    run = asyncio.create_task(bench.run("sleep:600", time_s=60.0))
    await until(bench.sleeps)
    cluster.processes.cut_connections()
    with pytest.raises(WorkerLostError) as lost:
        await run
    assert (lost.value.reason, lost.value.own) == ("WORKER_TIMEOUT", True)
    assert (await bench.run("describe")).artifacts
