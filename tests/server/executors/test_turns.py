"""One measurement at a time: what stands still meanwhile, and that no task pays for it."""

from __future__ import annotations

import asyncio
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from manual_clock import ManualClock
from modelpress_protos.internal.v1 import worker_pb2
from modelpress_protos.v1 import job_service_pb2
from modelpress_server.clock import Clock
from modelpress_server.executors.base import START_WORKER, Limits, TurnFigures
from modelpress_server.executors.local import WAITS_FOR_TURN, _Run
from modelpress_server.executors.output import EventFilter
from modelpress_server.executors.turns import MAX_TASK_S, MAX_TURN_S, MeasuringTurns
from server_harness import until


class Fake:
    """A worker that knows whether it stands still."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self.paused = 0

    def pause(self) -> None:
        self.paused += 1

    def resume(self) -> None:
        self.paused -= 1


@pytest.fixture
def workers() -> list[Fake]:
    """Three workers with a task each."""
    return [Fake(number) for number in range(3)]


@pytest.fixture
def gate(workers: list[Fake], clock: ManualClock) -> MeasuringTurns:
    """Their turns, on a clock that the test moves."""
    return MeasuringTurns(lambda: workers, clock)


def state_of(pid: int) -> str:
    """The letter that the kernel gives: R, S, T when stopped."""
    return Path(f"/proc/{pid}/stat").read_text("ascii").rsplit(")", 1)[1].split()[0]


async def settled() -> None:
    """Everything that can go on has gone on."""
    for _ in range(10):
        await asyncio.sleep(0)


async def test_the_others_stand_still_until_the_end(gate: MeasuringTurns, workers: list[Fake]) -> None:
    """A turn stops all but its holder, its end lets all go on."""
    await gate.take(workers[0])
    assert [worker.paused for worker in workers] == [0, 1, 1]
    gate.release(workers[0])
    assert [worker.paused for worker in workers] == [0, 0, 0]


async def test_turns_come_in_order_and_one_at_a_time(gate: MeasuringTurns, workers: list[Fake]) -> None:
    """Two that wait are not stopped, for they do nothing; they get their turns in the order in which they asked."""
    await gate.take(workers[0])
    second, third = (asyncio.create_task(gate.take(worker)) for worker in workers[1:])
    await settled()
    gate.release(workers[0])
    await settled()
    assert (second.done(), third.done()) == (True, False)
    gate.release(workers[1])
    await settled()
    assert third.done()


async def test_turns_are_counted(gate: MeasuringTurns, workers: list[Fake], clock: ManualClock) -> None:
    """How many were given, how long workers waited for them and had them, and who waits now."""
    await gate.take(workers[0])
    second = asyncio.create_task(gate.take(workers[1]))
    await settled()
    clock.advance(5)
    assert gate.figures() == TurnFigures(given=1, waiting=1)
    gate.release(workers[0])
    await second
    clock.advance(2)
    gate.release(workers[1])
    assert gate.figures() == TurnFigures(given=2, waited_s=5.0, held_s=7.0)


async def test_who_gives_up_waiting_leaves_the_queue(gate: MeasuringTurns, workers: list[Fake]) -> None:
    """A cancelled request does not keep the others waiting."""
    await gate.take(workers[0])
    second, third = (asyncio.create_task(gate.take(worker)) for worker in workers[1:])
    await settled()
    second.cancel()
    gate.release(workers[0])
    await settled()
    assert third.done()


async def test_nobody_measures_while_a_worker_starts(gate: MeasuringTurns, workers: list[Fake]) -> None:
    """And nobody is started while somebody measures, or waits to."""
    async with gate.starting():
        turn = asyncio.create_task(gate.take(workers[0]))
        await settled()
        assert not turn.done()
        start = asyncio.create_task(gate.starting().__aenter__())
        await settled()
        assert not start.done()
    await settled()
    assert turn.done()
    assert not start.done()
    gate.forget(workers[0])
    await settled()
    assert start.done()


async def test_a_turn_that_does_not_end_is_ended(gate: MeasuringTurns, workers: list[Fake], clock: ManualClock) -> None:
    """A worker that keeps its turn keeps the others for MAX_TURN_S at most, and for MAX_TASK_S in all its turns."""
    for _ in range(int(MAX_TASK_S / MAX_TURN_S)):
        await gate.take(workers[0])
        await settled()
        clock.advance(MAX_TURN_S - 1)
        await settled()
        assert [worker.paused for worker in workers] == [0, 1, 1]
        clock.advance(1)
        await settled()
        assert [worker.paused for worker in workers] == [0, 0, 0]
    await gate.take(workers[0])
    assert [worker.paused for worker in workers] == [0, 0, 0]


async def test_a_turn_that_ended_is_not_ended_again(
    gate: MeasuringTurns, workers: list[Fake], clock: ManualClock
) -> None:
    """The time of a turn counts from its own beginning, not from that of an earlier one."""
    for worker in workers[:2]:
        await gate.take(worker)
        await settled()
        clock.advance(MAX_TURN_S - 1)
        await settled()
        assert gate.taken
        gate.release(worker)
    assert not gate.taken
    await settled()
    assert clock.sleeping == []


async def test_a_real_task_stands_still_and_pays_nothing(start_bench: Any) -> None:
    """While one worker measures, another one's counter does not move, and its watchers are told why; neither its limit
    nor its own clock counts that time; then it goes on."""
    bench = await start_bench()
    counter, done = bench.root / "counter", bench.root / "done"
    counting = asyncio.create_task(bench.run("count:counter"))
    await until(counter.exists)
    measuring = asyncio.create_task(bench.run("measure:done"))
    await until(lambda: "measuring" in bench.lines)
    (stopped,) = [worker for worker in bench.executor._running if worker.paused_s]
    await until(lambda: state_of(stopped.pid) == "T")
    before = counter.read_text("ascii")
    await until(lambda: stopped.paused_s > 0.5)
    assert counter.read_text("ascii") == before
    told = [event.progress.message for event in bench.events if event.HasField("progress")]
    assert told[-1] == WAITS_FOR_TURN
    done.touch()
    await measuring
    told = [event.progress.message for event in bench.events if event.HasField("progress")]
    assert told[-1] != WAITS_FOR_TURN
    await until(lambda: counter.read_text("ascii") not in ("", before))
    (bench.root / "counter.stop").touch()
    event = await counting
    assert event.WhichOneof("event") == "compressed"
    answer = json.loads((bench.output / "answer.json").read_text("ascii"))
    assert answer["own_s"] < answer["wall_s"] - 0.25


async def test_a_task_that_waits_for_the_turn_of_another_says_so(start_bench: Any) -> None:
    """While one measures no worker is started: the task that came meanwhile tells why it does not begin."""
    bench = await start_bench()
    done = bench.root / "done"
    measuring = asyncio.create_task(bench.run("measure:done"))
    await until(lambda: "measuring" in bench.lines)
    waiting = asyncio.create_task(bench.run("measure:done"))
    told = worker_pb2.WorkerEvent()
    told.progress.stage, told.progress.message = START_WORKER, WAITS_FOR_TURN
    await until(lambda: told in bench.events)
    assert bench.lines.count("measuring") == 1
    done.touch()
    await asyncio.gather(measuring, waiting)
    assert bench.lines.count("measuring") == 2


def test_a_remark_keeps_the_place() -> None:
    """The server's own word stands beside the stage and the share that the worker told last."""
    told: list[worker_pb2.WorkerEvent] = []
    events = EventFilter(told.append)
    events.progress(job_service_pb2.Progress(stage="search", stage_index=1, fraction=0.5, message="timing"))
    events.remark(WAITS_FOR_TURN)
    events.unremark()
    first, second, third = (event.progress for event in told)
    assert (first.message, second.message, third.message) == ("timing", WAITS_FOR_TURN, "timing")
    assert (second.stage, second.stage_index, second.fraction) == ("search", 1, 0.5)


@dataclass
class Standing:
    """A worker that has stood still for all of its time."""

    clock: Clock
    pid: int = 0

    @property
    def paused_s(self) -> float:
        return self.clock.now_s()


async def test_a_limit_does_not_count_the_time_of_others(clock: ManualClock) -> None:
    """A task that stands still does not reach its limit, however long that lasts."""
    limits = Limits(time_s=5.0, memory_bytes=0)
    run = _Run(Standing(clock), limits, lambda _: None, MeasuringTurns(lambda: (), clock), clock)  # type: ignore[arg-type]
    over = asyncio.Event()
    work = asyncio.create_task(over.wait())
    ended = asyncio.create_task(run._until_time_is_up({work}))
    for _ in range(3):
        await until(lambda: clock.sleeping)
        clock.advance(limits.time_s)
    await until(lambda: clock.sleeping)
    assert not ended.done()
    over.set()
    assert await ended == {work}


async def test_measuring_is_pinned_where_asked(start_bench: Any) -> None:
    """Within a turn the worker and the threads that it starts run on the cores that were named; then as before."""
    allowed = sorted(os.sched_getaffinity(0))
    bench = await start_bench(measure_cores=(allowed[-1],), sandbox="auto")
    answer = await bench.answer("affinity")
    assert answer == {"before": allowed, "within": [allowed[-1]], "thread": [allowed[-1]], "after": allowed}
    elsewhere = await (await start_bench()).answer("affinity")
    assert elsewhere["within"] == allowed
