"""Jobs: creation, running, watching, cancelling, caching."""

from __future__ import annotations

import asyncio
import uuid
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf.duration_pb2 import Duration
from google.rpc import error_details_pb2
from manual_clock import ManualClock
from modelpress_protos.recipe import from_dict
from modelpress_protos.v1 import job_service_pb2, model_service_pb2
from modelpress_server.errors import StorageFullError
from modelpress_server.names import time_of_id_us
from server_harness import PROJECT, Client, Running, Serve, digest_of, failing, until

S = job_service_pb2
QUEUED, RUNNING, CANCELLING = S.JOB_STATE_QUEUED, S.JOB_STATE_RUNNING, S.JOB_STATE_CANCELLING
SUCCEEDED, FAILED, CANCELLED, EXPIRED = (
    S.JOB_STATE_SUCCEEDED,
    S.JOB_STATE_FAILED,
    S.JOB_STATE_CANCELLED,
    S.JOB_STATE_EXPIRED,
)


def reason_of(job: Any) -> str:
    info = error_details_pb2.ErrorInfo()
    assert job.error.details[0].Unpack(info)
    return str(info.reason)


async def watched(client: Client, job: Any, after: int = 0) -> list[Any]:
    """Everything that a watch says up to its end."""
    request = S.WatchJobRequest(name=job.name, after_sequence=after)
    return [response async for response in client.jobs.WatchJob(request)]


async def logs(client: Client, job: Any, **fields: Any) -> list[Any]:
    request = S.StreamJobLogsRequest(name=job.name, **fields)
    return [line async for line in client.jobs.StreamJobLogs(request)]


async def get(client: Client, job: Any) -> Any:
    return await client.jobs.GetJob(S.GetJobRequest(name=job.name))


async def test_runs_to_its_artifacts(running: Running) -> None:
    """A job without a recipe runs the default preset; artifacts can be read; progress never falls."""
    job = await running.client.wait(await running.client.job(await running.client.model()))
    assert (job.state, job.attempt, job.from_cache) == (SUCCEEDED, 1, False)
    assert job.spec.recipe.version == 1
    assert (job.progress.fraction, job.summary.optimized_size_bytes) == (1.0, 5)
    assert [artifact.kind for artifact in job.artifacts] == [
        S.Artifact.KIND_OPTIMIZED_MODEL,
        S.Artifact.KIND_REPORT_JSON,
    ]
    assert await running.client.read(job.artifacts[0].files[0].digest) == b"small"
    fractions = [event.progress.fraction for event in await watched(running.client, job) if event.HasField("progress")]
    assert fractions == [0.5, 0.5]
    assert list((running.settings.data_dir / "work").iterdir()) == []


async def test_data_reaches_the_worker(running: Running) -> None:
    """An uploaded data file is a file in the worker's folder; a missing one is a violation."""
    model = await running.client.model()
    failure = await failing(running.client.job(model, data=digest_of(b"missing")))
    assert [item.field for item in failure.detail(error_details_pb2.BadRequest).field_violations] == ["job.spec.data"]
    data = await running.client.upload(b"arrays")
    job = await running.client.wait(await running.client.job(model, data=data))
    report = await running.client.read(job.artifacts[1].files[0].digest)
    assert b"arrays".hex().encode() in report


async def test_an_identical_job_takes_the_earlier_result(running: Running) -> None:
    """The same content, recipe and data end at once from the cache; stated defaults count as the same."""
    client = running.client
    first = await client.wait(await client.job(await client.model()))
    again = await client.job(await client.model())
    assert (again.state, again.from_cache, again.artifacts) == (SUCCEEDED, True, first.artifacts)
    stated = await client.job(await client.model(), recipe=first.spec.recipe)
    assert stated.from_cache
    other = await client.wait(await client.job(await client.model(), recipe=from_dict({"version": 1})))
    assert not other.from_cache
    forced = await client.wait(await client.job(await client.model(), skip_cache=True))
    assert not forced.from_cache
    elsewhere = await client.wait(await client.job(await client.model("projects/other")))
    assert not elsewhere.from_cache
    await client.jobs.DeleteJob(S.DeleteJobRequest(name=first.name))
    assert not (await client.job(await client.model())).from_cache
    assert await client.read(again.artifacts[0].files[0].digest) == b"small"


async def test_request_id_makes_one_job(running: Running) -> None:
    """A retry with the same id is the same job; another payload is refused."""
    model = await running.client.model()
    request_id = str(uuid.uuid4())
    first = await running.client.job(model, request_id)
    await running.client.wait(first)
    assert (await running.client.job(model, request_id)).name == first.name
    failure = await failing(running.client.job(model, request_id, max_attempts=2))
    assert failure.reason == "REQUEST_ID_REUSED"
    assert running.executor.started == [first.name]


async def test_validate_only_creates_nothing(running: Running) -> None:
    """Everything is checked, nothing is stored."""
    model = await running.client.model()
    request = S.CreateJobRequest(parent=PROJECT, validate_only=True)
    request.job.spec.model = model.name
    assert (await running.client.jobs.CreateJob(request)).spec.recipe.version == 1
    request.job.spec.recipe.version = 9
    assert (await failing(running.client.jobs.CreateJob(request))).reason == "INVALID_FIELDS"
    assert len((await running.client.jobs.ListJobs(S.ListJobsRequest(parent=PROJECT))).jobs) == 0


async def test_all_violations_at_once(running: Running) -> None:
    """Recipe, references, timeouts, attempts, labels and the request id are reported together."""
    request = S.CreateJobRequest(parent=PROJECT, request_id="x")
    request.job.spec.model = "projects/other/models/" + "0" * 26
    request.job.spec.recipe.version = 1
    request.job.spec.recipe.steps.add().prune.sparsity = 1.4
    request.job.spec.recipe.steps.add().quantize.scheme = "magic"
    request.job.spec.data.sha256 = b"short"
    request.job.spec.queue_timeout.seconds = -1
    request.job.spec.max_attempts = 99
    request.job.labels["UPPER"] = ""
    failure = await failing(running.client.jobs.CreateJob(request))
    fields = [item.field for item in failure.detail(error_details_pb2.BadRequest).field_violations]
    assert fields[:3] == [
        "job.spec.model",
        "job.spec.recipe.steps[0].prune.sparsity",
        "job.spec.recipe.steps[1].quantize.scheme",
    ]
    expected = {"job.spec.data.sha256", "job.spec.queue_timeout", "job.spec.max_attempts", "request_id"}
    assert expected <= set(fields)


async def test_watch_resumes_by_sequence(running: Running) -> None:
    """Snapshot, events in order without gaps, final snapshot; after a cut only what was not seen."""
    job = await running.client.wait(await running.client.job(await running.client.model()))
    events = await watched(running.client, job)
    assert events[0].HasField("snapshot")
    assert events[-1].snapshot.state == SUCCEEDED
    assert [event.sequence for event in events[1:-1]] == list(range(1, job.last_sequence + 1))
    states = [event.state for event in events if event.HasField("state")]
    assert states == [QUEUED, RUNNING, SUCCEEDED]
    rest = await watched(running.client, job, after=job.last_sequence - 1)
    assert [event.sequence for event in rest] == [0, job.last_sequence, 0]
    for after in (-1, job.last_sequence + 1):
        assert (await failing(watched(running.client, job, after))).reason == "INVALID_FIELDS"


async def test_watch_follows_a_running_job_with_heartbeats(serve: Serve) -> None:
    """Events come while the job runs; an idle stream carries heartbeats; it ends with the job."""
    async with serve(heartbeat_s=0.05) as running:
        job = await running.client.job(await running.client.model(compress="wait"))
        call = running.client.jobs.WatchJob(S.WatchJobRequest(name=job.name))
        seen: list[Any] = []
        while not any(event.HasField("heartbeat") for event in seen) or seen[-1].progress.stage:
            seen.append(await call.read())
        running.executor.gate.set()
        while (event := await call.read()) is not grpc.aio.EOF:
            seen.append(event)
        assert seen[-1].snapshot.state == SUCCEEDED
        assert {event.sequence for event in seen if not event.HasField("heartbeat")} >= {1, 2, 3}


async def test_logs_are_kept_and_followed(running: Running) -> None:
    """Lines are numbered, resumable, and show control characters; `follow` stays until the end."""
    job = await running.client.job(await running.client.model(compress="wait"))
    following = asyncio.create_task(logs(running.client, job, follow=True))
    await running.executor.running.wait()
    running.executor.gate.set()
    lines = await following
    assert [(line.sequence, line.severity, line.text) for line in lines] == [(1, "INFO", r"start wait\x07")]
    assert await logs(running.client, job, after_sequence=1) == []


async def test_cancel_kills_the_worker(running: Running) -> None:
    """A running job is CANCELLING, its worker killed, then CANCELLED; cancelling again changes nothing."""
    job = await running.client.job(await running.client.model(compress="wait"))
    await running.executor.running.wait()
    assert (await running.client.jobs.CancelJob(S.CancelJobRequest(name=job.name))).state == CANCELLING
    job = await running.client.wait(job)
    assert (job.state, running.executor.killed) == (CANCELLED, [job.name])
    assert (await running.client.jobs.CancelJob(S.CancelJobRequest(name=job.name))).etag == job.etag


async def test_cancel_of_a_queued_job_is_immediate(running: Running) -> None:
    """A queued job never runs; its place in the queue is told before."""
    model = await running.client.model(compress="wait")
    first = await running.client.job(model, skip_cache=True)
    await running.executor.running.wait()
    second = await running.client.job(model, skip_cache=True)
    third = await running.client.job(model, skip_cache=True)
    assert (second.progress.queue_position, third.progress.queue_position) == (0, 1)
    assert (await running.client.jobs.CancelJob(S.CancelJobRequest(name=second.name))).state == CANCELLED
    assert (await get(running.client, third)).progress.queue_position == 0
    running.executor.gate.set()
    assert (await running.client.wait(third)).state == SUCCEEDED
    assert running.executor.started == [first.name, third.name]


async def test_delete_only_after_the_end(running: Running) -> None:
    """A job that runs cannot be deleted; afterwards it can, and it is gone."""
    job = await running.client.job(await running.client.model(compress="wait"))
    failure = await failing(running.client.jobs.DeleteJob(S.DeleteJobRequest(name=job.name)))
    assert (failure.code, failure.reason) == (grpc.StatusCode.FAILED_PRECONDITION, "WRONG_STATE")
    running.executor.gate.set()
    await running.client.wait(job)
    await running.client.jobs.DeleteJob(S.DeleteJobRequest(name=job.name))
    assert (await failing(get(running.client, job))).code == grpc.StatusCode.NOT_FOUND


@pytest.mark.parametrize(
    ("behaviour", "attempts", "reason"),
    [
        ("crash", 3, "WORKER_CRASHED"),
        ("memory", 1, "WORKER_OUT_OF_MEMORY"),
        ("fail", 1, "UNSUPPORTED_FORMAT"),
        ("bug", 1, "INTERNAL"),
        ("symlink", 3, "WORKER_CRASHED"),
    ],
)
async def test_failures(running: Running, behaviour: str, attempts: int, reason: str) -> None:
    """Only a crashed worker is tried again; the error has a reason and tells nothing of the server's insides."""
    job = await running.client.wait(await running.client.job(await running.client.model(compress=behaviour)))
    assert (job.state, job.attempt, reason_of(job)) == (FAILED, attempts, reason)
    assert "/" not in job.error.message
    assert len(job.artifacts) == 0
    assert job.error.ByteSize() < 4096


async def test_waiting_goes_by_the_time_that_passes(serve: Serve) -> None:
    """A wait ends when its time has passed, wherever the clock of the day was set meanwhile."""
    clock = ManualClock()
    async with serve(clock=clock) as running:
        job = await running.client.job(await running.client.model(compress="wait"))
        await running.executor.running.wait()
        request = S.WaitJobRequest(name=job.name)
        request.timeout.FromSeconds(7)
        waiting = asyncio.ensure_future(running.client.jobs.WaitJob(request))
        await until(lambda: 7.0 in clock.sleeping)
        clock.set_forward_s = -86400.0
        clock.advance(7)
        assert (await waiting).state == S.JOB_STATE_RUNNING
        running.executor.gate.set()


async def test_a_crash_is_tried_again(running: Running) -> None:
    """The second attempt succeeds, and the log says what happened to the first."""
    job = await running.client.wait(await running.client.job(await running.client.model(compress="crash_once")))
    assert (job.state, job.attempt) == (SUCCEEDED, 2)
    texts = [line.text for line in await logs(running.client, job)]
    assert any("signal 11" in text for text in texts)


async def test_a_job_inspects_its_model_on_the_way(running: Running) -> None:
    """A job need not wait for its model's inspection: loading is the same work, and what it found is kept."""
    running.executor.inspection_gate.clear()
    model = await running.client.model()
    job = await running.client.wait(await running.client.job(model))
    assert job.state == SUCCEEDED
    kept = await running.client.models.GetModel(model_service_pb2.GetModelRequest(name=model.name))
    assert (kept.state, kept.inspection.parameter_count) == (model_service_pb2.Model.STATE_ACTIVE, 7)


async def test_a_watcher_sees_the_queue_move(running: Running) -> None:
    """The place in the queue is told at first, and again whenever it is another one."""
    model = await running.client.model(compress="wait")
    first, second, third, last = [await running.client.job(model, skip_cache=True) for _ in range(4)]
    await running.executor.running.wait()
    events = running.client.jobs.WatchJob(S.WatchJobRequest(name=last.name))
    snapshot = await events.read()
    assert snapshot.snapshot.progress.queue_position == 2
    assert (await events.read()).state == QUEUED
    await running.client.jobs.CancelJob(S.CancelJobRequest(name=third.name))
    moved = await events.read()
    assert (moved.sequence, moved.progress.queue_position) == (0, 1)
    await running.client.jobs.CancelJob(S.CancelJobRequest(name=first.name))
    assert (await events.read()).progress.queue_position == 0
    await running.client.jobs.CancelJob(S.CancelJobRequest(name=second.name))
    running.executor.gate.set()
    while (event := await events.read()).WhichOneof("event") != "snapshot":
        assert event.sequence > 0
    assert event.snapshot.state == SUCCEEDED


async def test_queue_timeout_expires(running: Running) -> None:
    """A job that waited too long is EXPIRED while the worker is still busy."""
    model = await running.client.model(compress="wait")
    await running.client.job(model)
    await running.executor.running.wait()
    timeout = Duration(nanos=100_000_000)
    late = await running.client.wait(await running.client.job(model, skip_cache=True, queue_timeout=timeout))
    assert (late.state, reason_of(late)) == (EXPIRED, "QUEUE_TIMEOUT")


async def test_queue_limit(serve: Serve) -> None:
    """More queued jobs than allowed: RESOURCE_EXHAUSTED with RetryInfo; results of the cache still come."""
    async with serve(max_queued_jobs=1) as running:
        ready = await running.client.model()
        await running.client.wait(await running.client.job(ready))
        running.executor.running.clear()
        model = await running.client.model(compress="wait")
        await running.client.job(model)
        await running.executor.running.wait()
        await running.client.job(model, skip_cache=True)
        failure = await failing(running.client.job(model, skip_cache=True))
        assert (failure.code, failure.reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "QUEUE_FULL")
        assert failure.detail(error_details_pb2.RetryInfo).retry_delay.seconds > 0
        assert (await running.client.job(ready)).from_cache


async def test_limits_reach_the_executor(serve: Serve) -> None:
    """The run limit is the smaller one of the job's and the server's."""
    async with serve(run_time_limit_s=50.0, worker_memory_bytes=1 << 30) as running:
        model = await running.client.model()
        await running.client.wait(await running.client.job(model, run_timeout=Duration(seconds=7)))
        await running.client.wait(await running.client.job(model, skip_cache=True, run_timeout=Duration(seconds=70)))
        found = [(limits.time_s, limits.memory_bytes) for limits in running.executor.limits]
        assert found == [(7.0, 1 << 30), (50.0, 1 << 30)]


async def test_lists_and_filters(running: Running) -> None:
    """By state, label and model, in pages; another project sees nothing."""
    model = await running.client.model()
    jobs = [await running.client.job(model, labels={"n": str(index)}) for index in range(3)]
    for job in jobs:
        await running.client.wait(job)

    async def listed(text: str = "", parent: str = PROJECT, **fields: Any) -> list[str]:
        page = await running.client.jobs.ListJobs(S.ListJobsRequest(parent=parent, filter=text, **fields))
        return [job.name for job in page.jobs]

    names = [job.name for job in reversed(jobs)]
    assert await listed() == names
    assert await listed("state = SUCCEEDED") == names
    assert await listed("state = RUNNING") == []
    assert await listed('labels.n = "1"') == [jobs[1].name]
    assert await listed(f'model = "{model.name}" AND labels.n = "2"') == [jobs[2].name]
    assert await listed('labels.n = "1" OR labels.n = "2"') == names[:2]
    assert await listed('labels.n != "1"') == [names[0], names[2]]
    assert await listed("labels.n:* AND (state = SUCCEEDED OR state = FAILED)") == names
    assert await listed("labels.other:*") == []
    assert await listed(page_size=2) == names[:2]
    assert await listed(parent="projects/other") == []
    stolen = S.GetJobRequest(name=jobs[0].name.replace("default", "other"))
    assert (await failing(running.client.jobs.GetJob(stolen))).code == grpc.StatusCode.NOT_FOUND


async def test_filters_by_time(running: Running) -> None:
    """create_time to the millisecond, end_time to the microsecond; a job that has not ended has no end_time."""
    client = running.client
    first = await client.wait(await client.job(await client.model()))
    second = await client.job(await client.model(compress="wait"))

    async def listed(text: str) -> list[str]:
        return [job.name for job in (await client.jobs.ListJobs(S.ListJobsRequest(parent=PROJECT, filter=text))).jobs]

    made = time_of_id_us(second.name.rpartition("/")[2])
    moment = datetime.fromtimestamp(made / 1e6, UTC).isoformat()
    assert await listed(f'create_time >= "{moment}"') == [second.name]
    assert await listed(f'create_time < "{moment}"') == [first.name]
    assert await listed(f'create_time > "{moment}"') == []
    assert await listed(f'create_time <= "{moment}"') == [second.name, first.name]
    assert await listed(f'create_time = "{moment}"') == [second.name]
    assert await listed(f"create_time != {moment}") == [first.name]
    ended = first.end_time.ToDatetime(UTC).isoformat()
    assert await listed(f'end_time = "{ended}"') == [first.name]
    assert await listed(f'end_time > "{ended}"') == []
    assert await listed('end_time < "9999-12-31T23:59:59Z"') == [first.name]
    running.executor.gate.set()


async def test_filters_that_cannot_be_read(running: Running) -> None:
    """Each says what is wrong with it, and none is taken for another."""
    wrong = {
        "state = QUEUED AND": "cannot read",
        "(state = QUEUED OR state = RUNNING": ") is missing",
        "(state = QUEUED AND state = RUNNING)": "expected )",
        "state = QUEUED state = RUNNING": "expected AND",
        "state < QUEUED": "cannot be compared with <",
        "end_time = now": "is no time",
        "create_time > 2026-11-01T00:00:00": "is no time",
        "labels.a:b": "only `:*`",
        "size = 3": "there are state, labels.KEY, model, create_time, end_time",
        " OR ".join(["state = QUEUED"] * 21): "at most 20 terms",
    }
    for text, expected in wrong.items():
        failure = await failing(running.client.jobs.ListJobs(S.ListJobsRequest(parent=PROJECT, filter=text)))
        assert failure.reason == "INVALID_FIELDS"
        assert expected in failure.detail(error_details_pb2.BadRequest).field_violations[0].description


async def test_all_projects_are_listed_as_far_as_the_caller_may(serve: Serve, tmp_path: Path) -> None:
    """projects/- has what the projects' own lists have together: of a token's projects, and of no other."""
    tokens = tmp_path / "tokens"
    tokens.write_text("everything\nsome a:reader b:reader\nnone c:reader\n")
    async with serve() as running:
        models = [await running.client.model(f"projects/{project}") for project in "abd"]
        jobs = [await running.client.wait(await running.client.job(model)) for model in models]
    async with serve(token_file=tokens) as running:
        client = running.client

        async def listed(token: str, **fields: Any) -> Any:
            metadata = (("authorization", f"Bearer {token}"),)
            request = S.ListJobsRequest(parent="projects/-", **fields)
            return await client.jobs.ListJobs(request, metadata=metadata)

        def names(page: Any) -> list[str]:
            return [job.name for job in page.jobs]

        assert names(await listed("everything")) == [job.name for job in reversed(jobs)]
        first = await listed("some", page_size=1)
        second = await listed("some", page_size=1, page_token=first.next_page_token)
        assert names(first) + names(second) == [jobs[1].name, jobs[0].name]
        assert second.next_page_token == ""
        assert names(await listed("none")) == []
        found = await client.models.ListModels(
            model_service_pb2.ListModelsRequest(parent="projects/-", filter="state = ACTIVE"),
            metadata=(("authorization", "Bearer some"),),
        )
        assert [model.name for model in found.models] == [models[1].name, models[0].name]
        assert names(await listed("some", filter=f'model = "{models[0].name}"')) == [jobs[0].name]
        assert names(await listed("some", filter=f'model = "{models[2].name}"')) == []


async def test_a_job_outlives_its_model(running: Running) -> None:
    """Deleting the model leaves a queued job runnable: it has its own hold on the files."""
    model = await running.client.model(compress="wait")
    first = await running.client.job(model)
    await running.executor.running.wait()
    second = await running.client.job(model, skip_cache=True)
    await running.client.models.DeleteModel(model_service_pb2.DeleteModelRequest(name=model.name))
    running.executor.gate.set()
    assert (await running.client.wait(first)).state == SUCCEEDED
    assert (await running.client.wait(second)).state == SUCCEEDED
    failure = await failing(running.client.job(model))
    assert (failure.code, failure.reason) == (grpc.StatusCode.NOT_FOUND, "RESOURCE_NOT_FOUND")


async def test_wait_returns_early_and_at_the_timeout(running: Running) -> None:
    """WaitJob gives the job as it is when the time is over, or ended as soon as it has."""
    job = await running.client.job(await running.client.model(compress="wait"))
    await running.executor.running.wait()
    short = S.WaitJobRequest(name=job.name, timeout=Duration(nanos=50_000_000))
    assert (await running.client.jobs.WaitJob(short)).state == RUNNING
    waiting = asyncio.create_task(running.client.wait(job))
    running.executor.gate.set()
    assert (await waiting).state == SUCCEEDED


async def test_a_result_that_cannot_be_stored_ends_the_job(running: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever goes wrong at the very end, the job does not stay RUNNING."""
    jobs = running.server._scheduler._jobs
    real = jobs.finish

    async def broken(job_id: str, outcome: Any) -> None:
        if outcome.state == SUCCEEDED:
            raise RuntimeError("broken")
        await real(job_id, outcome)

    monkeypatch.setattr(jobs, "finish", broken)
    job = await running.client.wait(await running.client.job(await running.client.model()))
    assert (job.state, reason_of(job)) == (FAILED, "INTERNAL")


async def test_a_full_disk_at_the_end_is_waited_for(running: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    """The end of a job is stored once there is space again."""
    jobs = running.server._scheduler._jobs
    real, tries = jobs.finish, []

    async def full_at_first(job_id: str, outcome: Any) -> None:
        tries.append(outcome)
        if len(tries) == 1:
            raise StorageFullError("full")
        await real(job_id, outcome)

    monkeypatch.setattr(jobs, "finish", full_at_first)
    monkeypatch.setattr("modelpress_server.runs.STORE_RETRY_S", 0.01)
    job = await running.client.wait(await running.client.job(await running.client.model()))
    assert (job.state, len(tries)) == (SUCCEEDED, 2)
