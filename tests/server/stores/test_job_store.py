"""What every JobStore does, tried on SQLite and on PostgreSQL."""

from __future__ import annotations

import asyncio
import uuid
from collections import Counter

import pytest
from google.protobuf import duration_pb2
from modelpress_protos.v1 import job_service_pb2, model_service_pb2
from modelpress_server import errors
from modelpress_server.names import new_id
from modelpress_server.stores.database import Database
from modelpress_server.stores.jobs import Lease, LogLine, Outcome
from modelpress_server.stores.queries import ListQuery, RequestKey, Term
from modelpress_server.stores.records import now_us
from store_rows import KIND, Stores, blob_of, succeeded

QUEUED = job_service_pb2.JOB_STATE_QUEUED
RUNNING = job_service_pb2.JOB_STATE_RUNNING
CANCELLING = job_service_pb2.JOB_STATE_CANCELLING
CANCELLED = job_service_pb2.JOB_STATE_CANCELLED
SUCCEEDED = job_service_pb2.JOB_STATE_SUCCEEDED
FAILED = job_service_pb2.JOB_STATE_FAILED
EXPIRED = job_service_pb2.JOB_STATE_EXPIRED


@pytest.fixture
async def one(database: Database) -> Stores:
    """A server that lives."""
    stores = Stores(database)
    await stores.live()
    return stores


@pytest.fixture
async def other(database: Database) -> Stores:
    """Another one."""
    stores = Stores(database)
    await stores.live()
    return stores


def progress(stage: str) -> job_service_pb2.WatchJobResponse:
    return job_service_pb2.WatchJobResponse(progress=job_service_pb2.Progress(stage=stage))


async def test_a_job_runs_to_its_end(one: Stores) -> None:
    """Queued, claimed with the attempt counted, told of, ended with its artifacts; every step is an event in order."""
    model = await one.model()
    created = await one.job(model)
    assert created.message.state == QUEUED
    job = await one.claimed()
    assert (job.id, job.message.attempt, job.owner, job.fence) == (created.id, 1, one.server_id, 1)
    assert (await one.claim()).job is None
    assert await one.jobs.progress(job.lease, [progress("load"), progress("measure")], [LogLine(1, "INFO", "a line")])
    assert (await one.jobs.get("p", job.id)).message.progress.stage == "measure"
    assert await one.jobs.finish(job.lease, succeeded(b"small"))
    ended = await one.jobs.get("p", job.id)
    assert (ended.message.state, ended.owner) == (SUCCEEDED, None)
    assert await one.index.visible("p", [blob_of(b"small")], touch_us=None)
    events = await one.jobs.events(job.id, 0, 100)
    assert [event.sequence for event in events] == [1, 2, 3, 4, 5]
    assert [event.state for event in events if event.state] == [QUEUED, RUNNING, SUCCEEDED]
    assert await one.jobs.events(job.id, 3, 1) == [events[3]]
    assert [line.text for line in await one.jobs.logs(job.id, 0, 100)] == ["a line"]


async def test_each_job_is_claimed_once(one: Stores, other: Stores) -> None:
    """Forty jobs, eight that claim at the same time: each job comes once, and none is left."""
    model = await one.model()
    jobs = {(await one.job(model, skip_cache=True)).id for _ in range(40)}
    taken: list[str] = []

    async def take(stores: Stores) -> None:
        while (job := (await stores.claim()).job) is not None:
            taken.append(job.id)

    await asyncio.gather(*(take(stores) for stores in (one, other) for _ in range(4)))
    assert Counter(taken) == Counter(jobs)


async def test_who_claims_waits_for_nobody(one: Stores, other: Stores, database: Database) -> None:
    """While one claim is under way another one gets the next job, where the store allows two writers."""
    if not database.shared:
        pytest.skip("SQLite has one writer")
    model = await one.model()
    first, second = await one.job(model, skip_cache=True), await one.job(model, skip_cache=True)
    inner: list[str] = []
    loop = asyncio.get_running_loop()

    def claim_inside(projects: list[str]) -> list[str]:
        # Within the first claim, before it has chosen; it then chooses what is left.
        if not inner:
            job = asyncio.run_coroutine_threadsafe(other.claimed(), loop).result(60)
            inner.append(job.id)
        return list(projects)

    claim = await one.jobs.claim(now_us(), claim_inside, one.server_id)
    assert claim.job is not None
    assert (inner, claim.job.id) == ([first.id], second.id)


async def test_order_of_the_queue(one: Stores) -> None:
    """The highest priority first, then the oldest; what waits is passed over; the project whose turn it is."""
    model, elsewhere = await one.model(), await one.model(project="q")
    low = await one.job(model, priority=-1, skip_cache=True)
    plain = await one.job(model, skip_cache=True)
    high = await one.job(model, priority=5, skip_cache=True)
    strange = await one.job(elsewhere, skip_cache=True)
    assert (await one.jobs.queue_positions())[low.id] == 3
    asked: list[list[str]] = []

    def others_first(projects: list[str]) -> list[str]:
        asked.append(list(projects))
        return sorted(projects, reverse=True)

    claims = [await one.jobs.claim(now_us(), others_first, one.server_id, (plain.id,)) for _ in range(4)]
    assert [claim.job and claim.job.id for claim in claims] == [strange.id, high.id, low.id, None]
    assert asked[0] == ["p", "q"]
    assert (await one.claimed()).id == plain.id
    assert await one.jobs.counts() == (0, 4)


async def test_projects_that_wait(one: Stores) -> None:
    """All projects with something queued are offered, the one with the oldest job first, and nobody else."""
    names = ["m", "z", "a", "k"]
    for name in names:
        model = await one.model(project=name)
        await one.job(model, skip_cache=True)
    asked: list[list[str]] = []

    def note(projects: list[str]) -> list[str]:
        asked.append(list(projects))
        return list(projects)

    for _ in range(5):
        await one.jobs.claim(now_us(), note, one.server_id)
    assert asked == [names, names[1:], names[2:], names[3:], []]


async def test_a_lost_lease_changes_nothing(one: Stores, other: Stores) -> None:
    """Who was taken for dead may not write progress, end or queue the job that another one runs now."""
    await one.job(await one.model())
    lost = await one.claimed()
    await one.live(lease_s=0.0)
    assert await other.jobs.recover() == 1
    assert not await one.jobs.finish(lost.lease, succeeded(b"between"))
    assert not await one.jobs.progress(lost.lease, [progress("late")], [])
    again = await other.claimed()
    assert (again.message.attempt, again.fence, again.owner) == (2, 2, other.server_id)
    assert not await one.jobs.finish(lost.lease, succeeded(b"late"))
    assert not await one.jobs.progress(lost.lease, [progress("late")], [LogLine(1, "INFO", "late")])
    assert not await one.jobs.requeue(lost.lease, count_attempt=True)
    now = await one.jobs.get("p", lost.id)
    assert (now.message.state, now.message.progress.stage, now.owner) == (RUNNING, "", other.server_id)
    assert await other.jobs.finish(again.lease, succeeded(b"small"))
    assert not await other.jobs.finish(again.lease, Outcome(FAILED))
    assert (await one.jobs.get("p", lost.id)).message.state == SUCCEEDED


async def test_only_what_the_dead_had_is_taken_up(one: Stores, other: Stores) -> None:
    """A server that lives keeps its jobs, and so does one that renews in time."""
    model = await one.model()
    for _ in range(2):
        await one.job(model, skip_cache=True)
    mine, theirs = await one.claimed(), await other.claimed()
    assert await one.live()
    assert await other.jobs.recover() == 0
    await one.servers.remove(one.server_id)
    assert await other.jobs.recover() == 1
    assert (await one.jobs.get("p", mine.id)).message.state == QUEUED
    assert await other.jobs.held(other.server_id) == {theirs.lease: RUNNING}
    assert await one.jobs.held(one.server_id) == {}
    assert not await one.live()  # it was gone meanwhile, and is told so
    assert await one.live()


async def test_remove_others(one: Stores, other: Stores) -> None:
    """A server that is alone takes up everything."""
    await one.job(await one.model())
    await other.claimed()
    await one.servers.remove_others(one.server_id)
    assert await one.jobs.recover() == 1


async def test_recovery_happens_once(one: Stores, other: Stores) -> None:
    """Several that take up at the same time: each job is queued once, with one event and one line of the log."""
    model = await one.model()
    for _ in range(6):
        await one.job(model, skip_cache=True)
    lost = [await one.claimed() for _ in range(6)]
    await one.servers.remove(one.server_id)
    assert sum(await asyncio.gather(*(other.jobs.recover() for _ in range(4)))) == 6
    for job in lost:
        assert len(await one.jobs.events(job.id, 0, 100)) == 3
        assert len(await one.jobs.logs(job.id, 0, 100)) == 1


async def test_attempts_run_out(one: Stores, other: Stores) -> None:
    """A job whose servers are lost each time fails after its attempts; losses that are excused do not count."""
    await one.job(await one.model(), max_attempts=2)
    for excused, state in ((True, QUEUED), (False, QUEUED), (False, FAILED)):
        job = await one.claimed()
        await one.servers.remove(one.server_id)
        await other.jobs.recover(excused=excused)
        await one.live()
        assert (await one.jobs.get("p", job.id)).message.state == state


async def test_cancelling(one: Stores, other: Stores) -> None:
    """A queued job is cancelled at once; a running one is told so by `held`, and ends as CANCELLED whatever it says."""
    model = await one.model()
    running, queued = await one.job(model, skip_cache=True), await one.job(model, skip_cache=True)
    job = await one.claimed()
    assert job.id == running.id
    assert (await other.jobs.request_cancel("p", queued.id)).message.state == CANCELLED
    assert (await other.jobs.request_cancel("p", running.id)).message.state == CANCELLING
    assert await one.jobs.held(one.server_id) == {job.lease: CANCELLING}
    assert await one.jobs.finish(job.lease, succeeded(b"small"))
    assert (await one.jobs.get("p", running.id)).message.state == CANCELLED
    assert not await one.index.visible("p", [blob_of(b"small")], touch_us=None)


async def test_a_dead_servers_cancelled_job(one: Stores, other: Stores) -> None:
    """It ends as CANCELLED when it is taken up, and is not run again."""
    await one.job(await one.model())
    job = await one.claimed()
    await one.jobs.request_cancel("p", job.id)
    await one.servers.remove(one.server_id)
    await other.jobs.recover()
    assert (await one.jobs.get("p", job.id)).message.state == CANCELLED
    assert (await other.claim()).job is None


async def test_requests_make_one_job(one: Stores, other: Stores) -> None:
    """The same request, sent to two servers at once and again: one job. Another content under its id is refused."""
    model = await one.model()
    request = RequestKey(str(uuid.uuid4()), bytes(32))
    made = await asyncio.gather(*(stores.job(model, request) for stores in (one, other) for _ in range(4)))
    assert len({job.id for job in made}) == 1
    with pytest.raises(errors.RequestIdReusedError):
        await one.job(model, RequestKey(request.request_id, b"1" * 32))


async def test_limits_hold_on_many_servers(one: Stores, other: Stores) -> None:
    """Many at once: no more jobs are queued, no more models made and no more uploads begun than allowed."""
    model = await one.model()
    both = (one, other)
    jobs = [stores.job(model, max_queued=5, skip_cache=True) for stores in both for _ in range(6)]
    refused = await asyncio.gather(*jobs, return_exceptions=True)
    assert sum(isinstance(item, errors.QueueFullError) for item in refused) == 7
    models = [stores.model(most=4) for stores in both for _ in range(4)]
    refused = await asyncio.gather(*models, return_exceptions=True)
    assert sum(isinstance(item, errors.QuotaExceededError) for item in refused) == 5


async def test_identical_jobs_share_a_result(one: Stores, other: Stores) -> None:
    """What one server computed serves a job of the other, if all of it is still there; not in another project."""
    model = await one.model()
    await one.job(model)
    job = await one.claimed()
    await one.jobs.finish(job.lease, succeeded(b"small"))
    again = await other.job(model)
    assert (again.message.state, again.message.from_cache) == (SUCCEEDED, True)
    assert again.message.artifacts == (await one.jobs.get("p", job.id)).message.artifacts
    assert (await other.job(await other.model(project="q"))).message.state == QUEUED
    assert (await other.job(model, skip_cache=True)).message.state == QUEUED
    # Part of it was lost: the job runs, and so does the next one, whatever is there then.
    assert (await other.job(model, there=False)).message.state == QUEUED
    assert (await other.job(model)).message.state == QUEUED


async def test_results_are_those_of_a_kind_of_server(one: Stores, database: Database) -> None:
    """What one type of processor, or another version, has found does not serve servers that have none of it."""
    model = await one.model()
    await one.job(model)
    await one.jobs.finish((await one.claimed()).lease, succeeded(b"small"))
    strange, both = Stores(database, kinds=(b"another kind",)), Stores(database, kinds=(b"another kind", KIND))
    assert (await strange.job(model)).message.state == QUEUED
    assert (await Stores(database, kinds=()).job(model)).message.state == QUEUED
    assert (await one.job(model)).message.from_cache
    assert (await both.job(model)).message.from_cache


async def test_a_result_is_kept_for_the_kind_that_made_it(one: Stores, database: Database) -> None:
    """Of a server with nodes of several kinds, each result serves those of its own kind."""
    model, both = await one.model(), Stores(database, kinds=(KIND, b"another kind"))
    await both.job(model)
    await one.jobs.finish((await one.claimed()).lease, succeeded(b"small", made_by=b"another kind"))
    assert (await one.job(model)).message.state == QUEUED
    assert (await Stores(database, kinds=(b"another kind",)).job(model)).message.from_cache


async def test_queue_timeout(one: Stores) -> None:
    """A job whose time in the queue is over ends as EXPIRED, by a claim or by looking; the next deadline is known."""
    model = await one.model()
    waits = await one.job(model, skip_cache=True, queue_timeout=duration_pb2.Duration(seconds=3600))
    assert await one.jobs.next_queue_deadline_us() == waits.message.create_time.ToMicroseconds() + 3600 * 10**6
    late = now_us() + 3601 * 10**6
    assert await one.jobs.expire_overdue(late) == (waits.id,)
    overdue = await one.job(model, skip_cache=True, queue_timeout=duration_pb2.Duration(seconds=3600))
    claim = await one.jobs.claim(late, list, one.server_id)
    assert (claim.job, claim.ended) == (None, (overdue.id,))
    assert (await one.jobs.get("p", overdue.id)).message.state == EXPIRED


async def test_jobs_of_refused_models_fail(one: Stores) -> None:
    """They are queued while the model is looked at; once it is refused the next claim ends them, and goes on."""
    model, sound = await one.model(), await one.model(b"sound")
    refused = [await one.job(model, skip_cache=True) for _ in range(3)]
    runs = await one.job(sound)
    found = model_service_pb2.Model(state=model_service_pb2.Model.STATE_REJECTED)
    found.error.message = "It runs os.system."
    await one.models.finish_inspection(model.id, found)
    claim = await one.claim()
    assert claim.job is not None
    assert claim.job.id == runs.id
    assert set(claim.ended) == {job.id for job in refused}
    assert (await one.jobs.get("p", refused[0].id)).message.state == FAILED


async def test_labels_pages_and_deletion(one: Stores) -> None:
    """Labels are replaced under an etag and found again; pages go newest first; only what has ended is deleted."""
    model = await one.model()
    jobs = [await one.job(model, skip_cache=True) for _ in range(3)]
    etag = jobs[0].to_message().etag
    labelled = await one.jobs.set_labels("p", jobs[0].id, etag, {"team": "vision"})
    with pytest.raises(errors.EtagMismatchError):
        await one.jobs.set_labels("p", jobs[0].id, etag, {})
    found = await one.jobs.list_page(ListQuery(("p",), 10, where=((Term("label", "=", "vision", "team"),),)))
    assert [job.id for job in found.items] == [jobs[0].id]
    page = await one.jobs.list_page(ListQuery(("p",), 2))
    assert ([job.id for job in page.items], page.has_more) == ([jobs[2].id, jobs[1].id], True)
    with pytest.raises(errors.WrongStateError):
        await one.jobs.delete("p", jobs[0].id, "")
    await one.jobs.request_cancel("p", jobs[0].id)
    with pytest.raises(errors.EtagMismatchError):
        await one.jobs.delete("p", jobs[0].id, labelled.to_message().etag)
    await one.jobs.delete("p", jobs[0].id, "")
    with pytest.raises(errors.ResourceNotFoundError):
        await one.jobs.get("p", jobs[0].id)
    with pytest.raises(errors.ResourceNotFoundError):
        await one.jobs.get("q", jobs[1].id)


async def test_an_unknown_lease_is_lost(one: Stores) -> None:
    """A job that was deleted, or never was."""
    assert not await one.jobs.finish(Lease(new_id(), 1), succeeded(b"small"))
    assert not await one.jobs.requeue(Lease(new_id(), 1), count_attempt=False)
