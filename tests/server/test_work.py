"""Servers that run nothing, and processes beside them that do tasks and serve nothing; all on the same stores."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner
from modelpress_protos.v1 import job_service_pb2, model_service_pb2
from modelpress_server import cli
from modelpress_server.config import Settings, SettingsError
from modelpress_server.executors.base import WorkerUnavailableError
from modelpress_server.work import Work
from scripted_executor import ScriptedExecutor
from server_harness import Running, Serve, until
from shared_stores import new_database

pytest.importorskip("psycopg")
S = job_service_pb2


@pytest.fixture
def stores(postgres: str, s3: str) -> dict[str, str]:
    """Shared ones, whatever the environment says."""
    return {"database": new_database(postgres), "blobs": s3}


def worker(front: Running, folder: Path, executor: ScriptedExecutor, workers: int = 1) -> Work:
    """A process beside a server, with a folder of its own."""
    settings = replace(front.settings, data_dir=folder, workers=workers, lease_s=2.0)
    return Work(settings, lambda _: executor)


def waiting(front: Running) -> int:
    """What the manifest for KEDA asks the database for."""
    import psycopg

    path = Path(__file__).parents[2] / "deploy" / "kubernetes" / "scaled-job.yaml"
    query = list(yaml.safe_load_all(path.read_text("utf-8")))[1]["spec"]["triggers"][0]["metadata"]["query"]
    with psycopg.connect(front.settings.database) as connection:
        return int(connection.execute(query).fetchone()[0])


async def test_one_task_a_process(serve: Serve, tmp_path: Path) -> None:
    """Each does a job, or where none is queued looks at a model, or says that there is nothing to do."""
    async with serve(workers=0) as front:
        model = await front.client.model()
        jobs = [await front.client.job(model, skip_cache=True) for _ in range(2)]
        other = await front.client.model(inspect="ok", compress="fail")
        executor = ScriptedExecutor()
        assert waiting(front) == 4
        for _ in jobs:
            assert await worker(front, tmp_path / "work", executor).once()
        ended = [await front.client.wait(job) for job in jobs]
        assert [(job.state, job.attempt) for job in ended] == [(S.JOB_STATE_SUCCEEDED, 1)] * 2
        assert sorted(executor.started) == sorted(job.name for job in jobs)
        assert await worker(front, tmp_path / "work", executor).once()
        found = await front.client.models.GetModel(model_service_pb2.GetModelRequest(name=other.name))
        assert found.state == model_service_pb2.Model.STATE_ACTIVE
        assert not await worker(front, tmp_path / "work", executor).once()
        assert waiting(front) == 0
        assert front.executor.started == front.executor.inspecting == []


async def test_a_job_that_fails_was_done(serve: Serve, tmp_path: Path) -> None:
    """How it ended is the job's own; where no worker can be started it waits in the queue for the next process."""
    async with serve(workers=0) as front:
        job = await front.client.job(await front.client.model(compress="fail"))
        executor = ScriptedExecutor()
        executor.broken = True
        with pytest.raises(WorkerUnavailableError, match="The task waits"):
            await worker(front, tmp_path / "work", executor).once()
        assert (await front.client.jobs.GetJob(S.GetJobRequest(name=job.name))).state == S.JOB_STATE_QUEUED
        executor.broken = False
        assert await worker(front, tmp_path / "work", executor).once()
        assert (await front.client.wait(job)).state == S.JOB_STATE_FAILED


async def test_work_goes_on_until_it_is_stopped(serve: Serve, tmp_path: Path) -> None:
    """New jobs are taken as they come, cancelling reaches the process, and what runs at its end is queued again."""
    async with serve(workers=0) as front:
        executor = ScriptedExecutor()
        process = worker(front, tmp_path / "work", executor)
        await process.start()
        await until((tmp_path / "work" / "alive").exists)
        model = await front.client.model(compress="wait")
        job = await front.client.job(model)
        await until(lambda: executor.started == [job.name])
        await front.client.jobs.CancelJob(S.CancelJobRequest(name=job.name))
        assert (await front.client.wait(job)).state == S.JOB_STATE_CANCELLED
        assert executor.killed == [job.name]
        again = await front.client.job(model, skip_cache=True)
        await until(lambda: executor.started == [job.name, again.name])
        await process.stop()
        assert (await front.client.jobs.GetJob(S.GetJobRequest(name=again.name))).state == S.JOB_STATE_QUEUED


def test_it_needs_shared_stores(tmp_path: Path) -> None:
    """Alone, a process has nobody to take tasks from, and a server without workers nobody to do them."""
    with pytest.raises(SettingsError, match=r"workers: .*set --database"):
        Settings(workers=0)
    answer = CliRunner().invoke(cli.command, ["--data-dir", str(tmp_path), "work", "--once"])
    assert answer.exit_code == 2
    assert "set --database and --blobs" in answer.output
