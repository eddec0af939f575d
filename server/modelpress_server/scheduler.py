"""Hands models to inspect and queued jobs to the executor.

The store is the truth; the scheduler only remembers what it has running, and how much of it each project has had: they
take turns, for jobs and for inspections. A job inspects its model on the way; models
without a running job are inspected by themselves, in a place of their own, so that they need not wait for a long job.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Collection, Coroutine
from functools import partial
from typing import Any

from modelpress_protos.internal.v1 import worker_pb2
from modelpress_protos.v1 import job_service_pb2, model_service_pb2

from modelpress_server import logs
from modelpress_server.clock import Clock
from modelpress_server.executors.base import START_WORKER
from modelpress_server.fairness import FairShare
from modelpress_server.host import Host
from modelpress_server.projects import Projects
from modelpress_server.runs import Bill, JobRun, RunResources, inspect_model
from modelpress_server.sites.base import Postpone, PostponedError
from modelpress_server.stores.jobs import JobRecord, JobStore, Lease
from modelpress_server.stores.models import ModelRecord, ModelStore
from modelpress_server.stores.records import now_us
from modelpress_server.waiting import Notifier, Waits

logger = logging.getLogger(__name__)

INSPECTION_SLOTS = 1
# How long a new model waits for a job to inspect it on the way, unless somebody asks what it is.
JOB_EXPECTED_S = 3.0
MAX_EXPECTED = 100
IDLE_S = 60.0
FAULT_PAUSE_S = 2.0


class Scheduler:
    """Runs up to `settings.workers` jobs at the same time, with 0 no task at all; projects take turns."""

    def __init__(
        self,
        resources: RunResources,
        projects: Projects,
        models: ModelStore,
        jobs: JobStore,
        notifier: Notifier,
        host: Host,
        clock: Clock,
        server_id: str,
    ) -> None:
        self._server_id = server_id
        self._job_share = FairShare(
            lambda project: projects.limits(project).weight, lambda project: projects.limits(project).max_running_jobs
        )
        self._inspection_share = FairShare(lambda project: projects.limits(project).weight, lambda _: 0)
        self._resources = resources
        self._host = host
        self._clock = clock
        self._waits = Waits(clock)
        self._models = models
        self._jobs = jobs
        self._notifier = notifier
        self._wake = asyncio.Event()
        self._draining = False
        self._loop: asyncio.Task[None] | None = None
        self._runs: dict[str, JobRun] = {}
        self._strays: set[Lease] = set()  # claims in the store that no run here knows
        self._expected: dict[str, float] = {}  # models that a job may follow: until when
        self._inspecting: dict[str, model_service_pb2.InspectionStage.ValueType] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    async def start(self, *, machine_restarted: bool = False) -> None:
        """Takes up what dead servers left, then begins."""
        await self.recover(excused=machine_restarted)
        self._loop = asyncio.create_task(self._serve())

    async def recover(self, *, excused: bool = False) -> None:
        """Queues again what dead servers left."""
        recovered = await self._jobs.recover(excused=excused)
        if recovered:
            logger.info("%d job(s) of a server that is gone are queued again", recovered)
            self._notifier.notify_all()
            self.wake()

    async def compare(self) -> None:
        """Lets go of what is this server's no longer, and of what it was given without learning of it.

        A job was cancelled through another server, or was taken over while this one could not be heard; or the answer
        to a claim was lost with a connection.
        """
        began = {run.lease for run in self._runs.values()}
        held = await self._jobs.held(self._server_id)
        for job_id, run in list(self._runs.items()):
            if run.lease in began and run.lease not in held:
                run.stop("lost")
            elif held.get(run.lease) == job_service_pb2.JOB_STATE_CANCELLING:
                self.cancel(job_id)
        present = {run.lease for run in self._runs.values()}
        unknown = held.keys() - present
        # Seen twice: a claim, or an end, is not under way so long.
        for lease in unknown & self._strays:
            await self._jobs.requeue(lease, count_attempt=False)
        self._strays = unknown

    async def beat(self) -> None:
        """This server was heard of again: takes up what dead ones left, and compares."""
        await self.recover()
        await self.compare()
        self.wake()  # what another server told of may have been lost

    def hear(self, name: str, state: str) -> None:
        """Another server, or this one, told of a job or a model; see `stores.news.News`."""
        if state == "CANCELLING":
            self.cancel(name)
        if state == "PROCESSING":
            self.expect_job(name)
        elif name and not state:
            self._notifier.notify(name)
        else:  # the queue is another one
            if name:
                self._notifier.notify(name)
            else:
                self._notifier.notify_all()
            self._notifier.notify_queue()
            self.wake()

    async def take_one(self) -> bool:
        """Does one task to its end, a job or else an inspection, instead of `start`. False: there was none."""
        await self.recover()
        if not (await self._begin_job() or await self._begin_inspection()):
            return False
        await asyncio.wait(self._tasks)
        return True

    def wake(self) -> None:
        """There may be something to do."""
        self._wake.set()

    def expect_job(self, model_id: str) -> None:
        """A model has come. Mostly a job for it follows, after its data, and inspects it on the way."""
        loop = asyncio.get_running_loop()
        self._expected[model_id] = loop.time() + JOB_EXPECTED_S
        if len(self._expected) > MAX_EXPECTED:
            del self._expected[next(iter(self._expected))]
        loop.call_later(JOB_EXPECTED_S, self.wake)

    def inspect_soon(self, model_id: str) -> None:
        """Somebody asks what it is."""
        if self._expected.pop(model_id, None) is not None:
            self.wake()

    def inspection_stage(self, model: ModelRecord) -> model_service_pb2.InspectionStage.ValueType:
        """Where the inspection of a model that is PROCESSING stands."""
        elsewhere = model.owner not in (None, self._server_id)
        begun = model_service_pb2.INSPECTION_STAGE_RUNNING if elsewhere else model_service_pb2.INSPECTION_STAGE_QUEUED
        return self._inspecting.get(model.id, begun)

    def cancel(self, job_id: str) -> None:
        """Stops the run of a job, if there is one."""
        self._waits.forget(job_id)
        if job_id in self._runs:
            self._runs[job_id].stop("cancel")

    async def drain(self, grace_s: float) -> None:
        """Starts nothing more; what runs may finish within the grace, then is stopped and queued again."""
        self._draining = True
        self.wake()
        if self._loop is not None:
            if not self._host.able:  # it may be trying to start a worker
                self._loop.cancel()
            await asyncio.wait([self._loop])
        jobs = [task for task in self._tasks if task.get_name() in self._runs]
        if jobs and grace_s > 0:
            await asyncio.wait(jobs, timeout=grace_s)
        for run in list(self._runs.values()):
            run.stop("drain")
        for task in self._tasks:
            # A model stays PROCESSING and is inspected by the next server.
            if task.get_name() in self._inspecting:
                task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks)

    async def _serve(self) -> None:
        while not self._draining:
            self._wake.clear()
            pause_s = FAULT_PAUSE_S
            try:
                pause_s = await self._fill()
            except Exception:  # a full disk or a bug must not end the scheduling
                logger.exception("the scheduler failed; it goes on in %g s", FAULT_PAUSE_S)
            waking = asyncio.ensure_future(self._wake.wait())
            try:
                await self._clock.wait({waking}, pause_s)
            finally:
                waking.cancel()

    async def _fill(self) -> float:
        """Starts what there is room for; returns when to look again, in seconds."""
        if not self._host.able and (pause_s := await self._host.recover()):
            await self._expire_overdue()
            return pause_s
        pause_s = min(IDLE_S, self._waits.next_s())  # before anything is claimed, lest one comes due unseen
        while len(self._runs) < self._resources.settings.workers and not self._draining:
            if not await self._begin_job():
                break
        else:
            # All workers are busy: nobody claims, so overdue jobs are looked for by their deadline.
            if _is_over(await self._jobs.next_queue_deadline_us()):
                await self._expire_overdue()
        while self._resources.settings.workers and len(self._inspecting) < INSPECTION_SLOTS and not self._draining:
            if not await self._begin_inspection():
                break
        deadline_us = await self._jobs.next_queue_deadline_us()
        if deadline_us is None:
            return pause_s
        return min(max((deadline_us - now_us()) / 1e6, 0.01), pause_s)

    async def _begin_job(self) -> bool:
        """False: none is queued."""
        while True:
            claim = await self._jobs.claim(now_us(), self._job_share.rank, self._server_id, self._waits.names())
            for job_id in claim.ended:
                self._notifier.notify(job_id)
            if claim.job is not None:
                break
            if not claim.ended:
                return False
        self._notifier.notify_queue()  # those behind it have another place in it
        run = JobRun(
            self._resources,
            claim.job,
            self._jobs,
            self._models,
            self._notifier,
            postponed=self._waits.knows(claim.job.id),
            growth=self._waits.growth(claim.job.id),
        )
        self._runs[claim.job.id] = run
        self._job_share.started(claim.job.project)
        self._spawn(claim.job.id, self._run(run, claim.job))
        return True

    async def _begin_inspection(self) -> bool:
        """False: no model waits for one."""
        busy = (*self._inspecting, *self._waits.names(), *self._awaited())
        model = await self._models.claim_inspection(busy, self._inspection_share.rank, self._server_id)
        if model is None:
            return False
        self._inspecting[model.id] = model_service_pb2.INSPECTION_STAGE_RUNNING
        self._inspection_share.started(model.project)
        self._spawn(model.id, self._inspect(model))
        return True

    def _awaited(self) -> Collection[str]:
        """Models that a job may still come for."""
        now_s = asyncio.get_running_loop().time()
        self._expected = {name: until_s for name, until_s in self._expected.items() if until_s > now_s}
        return self._expected

    async def _expire_overdue(self) -> None:
        for job_id in await self._jobs.expire_overdue(now_us()):
            self._notifier.notify(job_id)

    def _spawn(self, name: str, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work, name=name)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _run(self, run: JobRun, record: JobRecord) -> None:
        logs.bind(project=record.project, job=record.id)
        began_s = self._clock.now_s()
        try:
            again = await run.run()
            await self._note(record.id, again.why if again is not None else None)
        except Exception:  # the record stays RUNNING and is taken up at the next start
            logger.exception("job %s: its end could not be stored", record.id)
        finally:
            del self._runs[record.id]
            self._job_share.ended(record.project, self._clock.now_s() - began_s)
            self.wake()

    def _note_stage(self, model_id: str, bill: Bill, event: worker_pb2.WorkerEvent) -> None:
        if event.HasField("used"):
            bill.add(event.used)
        # What is told of a worker that has ended says nothing, and would hold the place of its inspection for ever.
        if event.HasField("progress") and model_id in self._inspecting:
            starts = event.progress.stage == START_WORKER
            self._inspecting[model_id] = (
                model_service_pb2.INSPECTION_STAGE_STARTING_WORKER
                if starts
                else model_service_pb2.INSPECTION_STAGE_RUNNING
            )

    async def _inspect(self, record: ModelRecord) -> None:
        logs.bind(project=record.project, model=record.id)
        began_s = self._clock.now_s()
        try:
            async with Bill(self._resources.usage, record.project, count_run=False) as bill:
                note, growth = partial(self._note_stage, record.id, bill), self._waits.growth(record.id)
                found = await inspect_model(self._resources, record, note, growth=growth)
            await self._models.finish_inspection(record.id, found)
            await self._note(record.id, None)
        except PostponedError as error:
            logger.warning("model %s waits for its inspection: %s", record.id, error)
            await self._note(record.id, error.why)
        except Exception:  # the model stays PROCESSING and is inspected again
            logger.exception("model %s: its inspection could not be stored", record.id)
            await asyncio.sleep(FAULT_PAUSE_S)
        finally:
            self._inspecting.pop(record.id, None)
            self._inspection_share.ended(record.project, self._clock.now_s() - began_s)
            self.wake()

    async def _note(self, name: str, why: Postpone | None) -> None:
        """A job or model has ended its run, or is put off: then it is left alone for a while."""
        if why is None:
            self._waits.ended(name)
        elif why is Postpone.HOST:
            await self._host.failed()
        elif why not in (Postpone.DRAIN, Postpone.LOSS, Postpone.TAKEN):
            self._waits.put_off(name, grow=why is Postpone.MORE_ROOM)


def _is_over(deadline_us: int | None) -> bool:
    return deadline_us is not None and deadline_us <= now_us()
