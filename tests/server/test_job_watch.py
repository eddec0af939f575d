"""WatchJobs, and how long a job is about to take."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from modelpress_protos.v1 import job_service_pb2
from modelpress_server import pace
from modelpress_server.services import job_watch
from modelpress_server.stores.overview import StateChange
from server_harness import PROJECT, Running, Serve, failing, until

S = job_service_pb2


@pytest.fixture(autouse=True)
def no_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(job_watch, "INTERVAL_S", 0.01)


class Watched:
    """What a stream has brought so far."""

    def __init__(self) -> None:
        self.responses: list[Any] = []

    @property
    def caught_up(self) -> bool:
        return any(response.caught_up for response in self.responses)

    def states(self, job: Any) -> list[int]:
        """The different states of a job, in order."""
        found = [response.job.state for response in self.responses if response.job.name == job.name]
        return [state for index, state in enumerate(found) if state not in found[:index]]

    def names(self) -> set[str]:
        return {response.job.name for response in self.responses if response.HasField("job")}


@asynccontextmanager
async def watching(running: Running, parent: str = PROJECT, token: str = "", **fields: Any) -> AsyncIterator[Watched]:
    """Follows until the end of the block; errors of the stream are raised there."""
    watched = Watched()
    metadata = (("authorization", f"Bearer {token}"),) if token else ()
    call = running.client.jobs.WatchJobs(S.WatchJobsRequest(parent=parent, **fields), metadata=metadata)

    async def follow() -> None:
        async for response in call:
            watched.responses.append(response)

    following = asyncio.create_task(follow())
    try:
        await until(lambda: watched.caught_up or following.done())
        yield watched
    finally:
        call.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await following


async def test_jobs_come_as_they_are_and_as_they_change(running: Running) -> None:
    """First those that have not ended, then every change of any job, those that come and end at once too."""
    client = running.client
    model = await client.model()
    ended = await client.wait(await client.job(model))
    held = await client.job(await client.model(compress="wait"))
    await running.executor.running.wait()
    async with watching(running) as watched:
        assert watched.names() == {held.name}
        queued = await client.job(model, skip_cache=True)
        await until(lambda: watched.states(queued) == [S.JOB_STATE_QUEUED])
        cached = await client.job(model)
        await until(lambda: watched.states(cached) == [S.JOB_STATE_SUCCEEDED])
        request = S.UpdateJobRequest(job=S.Job(name=ended.name, labels={"a": "1"}))
        await client.jobs.UpdateJob(request)
        running.executor.gate.set()
        await until(lambda: watched.states(queued)[-1:] == [S.JOB_STATE_SUCCEEDED])
        await until(lambda: watched.states(held)[-1:] == [S.JOB_STATE_SUCCEEDED])
        last = [response.job for response in watched.responses if response.job.name == held.name][-1]
        assert last.artifacts
        count = len(watched.responses)
        assert (await client.wait(queued)).state == S.JOB_STATE_SUCCEEDED
        assert len([one for one in watched.responses[count:] if one.HasField("job")]) == 0


async def test_places_in_the_queue_are_news(running: Running) -> None:
    """A job that moves up is sent again."""
    client = running.client
    held = await client.job(await client.model(compress="wait"))
    await running.executor.running.wait()
    model = await client.model()
    first = await client.job(model, skip_cache=True)
    second = await client.job(model, skip_cache=True)
    async with watching(running) as watched:
        await client.jobs.CancelJob(S.CancelJobRequest(name=first.name))

        def places() -> list[int]:
            return [one.job.progress.queue_position for one in watched.responses if one.job.name == second.name]

        await until(lambda: places() == [1, 0])
        running.executor.gate.set()
        await client.wait(held)


async def test_filters_and_projects(serve: Serve, tmp_path: Path) -> None:
    """Only what matches, of the projects that the caller may read; a wrong filter is told at once."""
    tokens = tmp_path / "tokens"
    tokens.write_text("everything\nonly-a a:reader\n")
    async with serve() as running:
        models = {name: await running.client.model(f"projects/{name}", compress="wait") for name in "ab"}
        jobs = [await running.client.job(models[name], labels={"n": name}) for name in "aab"]
    async with serve(token_file=tokens, workers=1) as running:
        async with watching(running, "projects/-", "only-a") as watched:
            assert watched.names() == {jobs[0].name, jobs[1].name}
        async with watching(running, "projects/-", "everything", filter='labels.n = "b"') as watched:
            assert watched.names() == {jobs[2].name}
        wrong = running.client.jobs.WatchJobs(
            S.WatchJobsRequest(parent="projects/-", filter="x = 1"), metadata=(("authorization", "Bearer only-a"),)
        )
        assert (await failing(wrong.read())).reason == "INVALID_FIELDS"
        running.executor.gate.set()


async def test_it_ends_with_the_token_and_with_the_server(
    serve: Serve, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A caller whose projects are others watches no longer; a server that shuts down says so."""
    monkeypatch.setattr("modelpress_server.interceptors.RECHECK_S", 0.05)
    tokens = tmp_path / "tokens"
    tokens.write_text("one a:reader\n")
    async with serve(token_file=tokens, heartbeat_s=0.05) as running:
        call = running.client.jobs.WatchJobs(
            S.WatchJobsRequest(parent="projects/-"), metadata=(("authorization", "Bearer one"),)
        )
        assert (await call.read()).caught_up
        assert (await call.read()).HasField("heartbeat")
        tokens.write_text("one b:reader\n")

        async def to_the_end() -> None:
            while True:
                assert (await call.read()).HasField("heartbeat")

        assert (await failing(to_the_end())).reason == "PERMISSION_DENIED"
    async with serve(data_dir=tmp_path / "other") as running:
        call = running.client.jobs.WatchJobs(S.WatchJobsRequest(parent=PROJECT))
        assert (await call.read()).caught_up
        ending = asyncio.create_task(running.server.stop())
        assert (await failing(call.read())).reason == "DRAINING"
        await ending
        monkeypatch.setattr(running.server, "stop", nothing)


async def nothing() -> None:
    """In the place of the second stop."""


async def test_how_long_it_is_about_to_take(running: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    """A queued job by what jobs took lately, a running one by its pace; nothing while too little is known."""
    monkeypatch.setattr(pace, "LEAST_S", 0.0)
    client = running.client
    held = await client.job(await client.model(compress="wait"))
    await running.executor.running.wait()
    model = await client.model()
    jobs = [await client.job(model, skip_cache=True) for _ in range(2)]
    assert not jobs[1].progress.HasField("eta")
    for _ in range(pace.FEWEST):
        running.server._database.on_change(StateChange("job", "p", "x", "SUCCEEDED", run_s=10.0))
    asked = [await client.jobs.GetJob(S.GetJobRequest(name=job.name)) for job in jobs]
    assert [job.progress.eta.ToSeconds() for job in asked] == [5, 15]

    async def runs() -> Any:
        found = await client.jobs.GetJob(S.GetJobRequest(name=held.name))
        return found if found.progress.fraction == 0.5 else None

    found = await until(runs)
    assert found.progress.HasField("eta")
    async for response in client.jobs.WatchJob(S.WatchJobRequest(name=jobs[1].name)):
        assert response.snapshot.progress.eta.ToSeconds() == 15
        break
    running.executor.gate.set()
    ended = await client.wait(held)
    assert not ended.progress.HasField("eta")


def test_the_pace_is_a_median_of_the_last(monkeypatch: pytest.MonkeyPatch) -> None:
    """Failures and inspections say nothing; one long job does not make all seem long; workers share the queue."""
    paced = pace.Pace(workers=2)
    job = S.Job(state=S.JOB_STATE_QUEUED, progress=S.Progress(queue_position=3))
    for change in (
        StateChange("job", "p", "x", "FAILED", run_s=0.1),
        StateChange("model", "p", "x", "ACTIVE"),
        StateChange("job", "p", "x", "SUCCEEDED"),  # from the cache
        *(StateChange("job", "p", "x", "SUCCEEDED", run_s=run_s) for run_s in (4.0, 4.0)),
    ):
        paced.note(change)
    paced.tell(job)
    assert not job.progress.HasField("eta")
    paced.note(StateChange("job", "p", "x", "SUCCEEDED", run_s=1000.0))
    paced.tell(job)
    assert job.progress.eta.ToMilliseconds() == 7000
