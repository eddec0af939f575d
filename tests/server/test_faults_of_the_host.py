"""What the machine lacks costs no job its attempts and no model its acceptance: they wait, and go on."""

from __future__ import annotations

import errno
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from manual_clock import ManualClock
from modelpress_protos.internal.v1 import worker_pb2
from modelpress_protos.v1 import job_service_pb2, model_service_pb2
from modelpress_server import lock
from modelpress_server.errors import make_status
from modelpress_server.executors.base import WorkerLostError
from modelpress_server.host import MAX_BACKOFF_S
from modelpress_server.waiting import Waits
from server_harness import Client, Running, Serve, until

S = job_service_pb2
Model = model_service_pb2.Model


async def health(client: Client, service: str = "") -> int:
    request = health_pb2.HealthCheckRequest(service=service)
    return (await health_pb2_grpc.HealthStub(client.channel).Check(request)).status


async def job_now(client: Client, job: Any) -> Any:
    return await client.jobs.GetJob(S.GetJobRequest(name=job.name))


async def model_now(client: Client, model: Any) -> Any:
    return await client.models.GetModel(model_service_pb2.GetModelRequest(name=model.name))


async def log_of(client: Client, job: Any) -> list[str]:
    return [line.text async for line in client.jobs.StreamJobLogs(S.StreamJobLogsRequest(name=job.name))]


async def ended(running: Running, clock: ManualClock, job: Any) -> Any:
    """The job once it has ended; time goes on, so that whatever was put off is tried again."""

    async def found() -> Any:
        clock.advance(Waits.MAX_S)
        current = await job_now(running.client, job)
        return current if current.HasField("end_time") else None

    return await until(found)


async def test_a_host_that_cannot_start_workers_waits(serve: Serve, clock: ManualClock) -> None:
    """Jobs stay QUEUED without an attempt, models PROCESSING, the health is NOT_SERVING; all go on when it can."""
    serving, not_serving = health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse.NOT_SERVING
    async with serve(clock, workers=4) as running:
        client = running.client
        running.executor.broken = True
        models = [await client.model(labels={"n": str(index)}) for index in range(3)]
        jobs = [await client.job(model, skip_cache=True) for model in models]
        await until(lambda: not running.server._scheduler._host.able)
        for _ in range(20):
            clock.advance(MAX_BACKOFF_S)
            assert await health(client) == not_serving
        assert await health(client, "modelpress.v1.JobService") == not_serving
        assert await health(client, "modelpress.v1.UploadService") == serving
        for job, model in zip(jobs, models, strict=True):

            async def put_back(job: Any = job) -> bool:
                found = await job_now(client, job)
                return (found.state, found.attempt) == (S.JOB_STATE_QUEUED, 0)

            await until(put_back)
            assert (await model_now(client, model)).state == Model.STATE_PROCESSING
        running.executor.broken = False
        clock.advance(MAX_BACKOFF_S)
        for job, model in zip(jobs, models, strict=True):
            found = await ended(running, clock, job)
            assert (found.state, found.attempt, found.excused_losses) == (S.JOB_STATE_SUCCEEDED, 1, 0)
            assert (await model_now(client, model)).state == Model.STATE_ACTIVE
        assert await health(client) == serving


@pytest.mark.parametrize("number", [errno.EMFILE, errno.ENFILE, errno.EAGAIN, errno.ENOMEM, errno.ENOSPC, errno.EDQUOT])
async def test_a_shortage_of_the_machine_is_no_failure(serve: Serve, clock: ManualClock, number: int) -> None:
    """A job that meets one is put off and succeeds at its first attempt; its log says why it waited, once."""
    async with serve(clock) as running:
        model = await running.client.model()
        running.executor.inspection_gate.clear()
        running.executor.raises = [OSError(number, "short")] * 3
        job = await running.client.job(model)
        found = await ended(running, clock, job)
        assert (found.state, found.attempt, running.executor.raises) == (S.JOB_STATE_SUCCEEDED, 1, [])
        assert sum("The job waits" in text for text in await log_of(running.client, job)) == 1


async def test_an_inspection_that_meets_a_shortage_is_tried_again(serve: Serve, clock: ManualClock) -> None:
    """The model stays PROCESSING and becomes ACTIVE later."""
    async with serve(clock) as running:
        running.executor.raises = [OSError(errno.EMFILE, "short")]
        model = await running.client.model()
        await until(running.server._scheduler._waits.names)
        assert (await model_now(running.client, model)).state == Model.STATE_PROCESSING

        async def active() -> bool:
            clock.advance(Waits.MAX_S)
            return (await model_now(running.client, model)).state == Model.STATE_ACTIVE

        await until(active)


async def test_a_full_disk_that_the_worker_meets_is_no_failure(
    serve: Serve, clock: ManualClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """STORAGE_FULL from a worker puts the job off; the same from a file that is too large is the job's own fault."""
    answers = ["STORAGE_FULL", "", "WORKER_OUT_OF_DISK"]
    async with serve(clock) as running:
        real = running.executor._compress

        async def compress(task: Any, on_event: Any) -> worker_pb2.WorkerEvent:
            reason = answers.pop(0)
            if not reason:
                return await real(task, on_event)
            return worker_pb2.WorkerEvent(failed=make_status(grpc.StatusCode.RESOURCE_EXHAUSTED, reason, "Full."))

        monkeypatch.setattr(running.executor, "_compress", compress)
        model = await running.client.model()
        job = await running.client.job(model)
        found = await ended(running, clock, job)
        assert (found.state, found.attempt) == (S.JOB_STATE_SUCCEEDED, 1)
        found = await running.client.wait(await running.client.job(model, skip_cache=True))
        assert (found.state, found.attempt) == (S.JOB_STATE_FAILED, 1)


async def test_a_worker_that_others_brought_down_costs_no_attempt(serve: Serve) -> None:
    """Such losses are counted apart, and only so many are excused."""
    async with serve() as running:
        model = await running.client.model()
        running.executor.inspection_gate.clear()  # the losses are for the job
        running.executor.raises = [WorkerLostError("WORKER_CRASHED", "Killed.", own=False)] * 4
        found = await running.client.wait(await running.client.job(model, max_attempts=1))
        assert (found.state, found.attempt, found.excused_losses) == (S.JOB_STATE_SUCCEEDED, 1, 4)
        running.executor.raises = [WorkerLostError("WORKER_CRASHED", "Killed.", own=False)] * 100
        found = await running.client.wait(await running.client.job(model, max_attempts=1, skip_cache=True))
        assert (found.state, found.excused_losses) == (S.JOB_STATE_FAILED, 10)
        running.executor.raises.clear()


@pytest.mark.parametrize("restarted", [True, False])
async def test_a_restart_of_the_machine_costs_no_attempt(
    serve: Serve, monkeypatch: pytest.MonkeyPatch, tmp_path: Any, restarted: bool
) -> None:
    """Jobs that ran when the machine went down run again, also with one attempt; a lost server uses the attempt up."""
    async with serve() as running:
        job = await running.client.job(await running.client.model(compress="wait"), max_attempts=1)
        await running.executor.running.wait()

        # What is left when everything stops at once: the job is RUNNING in the records.
        async def lost(*_: Any, **__: Any) -> None:
            return None

        monkeypatch.setattr(running.server._scheduler._jobs, "requeue", lost)
    if restarted:
        boot_id = tmp_path / "boot_id"
        boot_id.write_text("another")
        monkeypatch.setattr(lock, "_BOOT_ID", boot_id)
    async with serve() as running:
        running.executor.gate.set()
        found = await running.client.wait(job)
        expected = (S.JOB_STATE_SUCCEEDED, 1, 1) if restarted else (S.JOB_STATE_FAILED, 1, 0)
        assert (found.state, found.attempt, found.excused_losses) == expected
