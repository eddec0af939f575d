"""One measurement at a time: what stands still meanwhile, and that no task pays for it."""

from __future__ import annotations

import asyncio
import json
import time
from pathlib import Path
from typing import Any

import pytest
from modelpress_server.clock import Clock
from modelpress_server.executors import turns
from modelpress_server.executors.base import Limits
from modelpress_server.executors.local import _Run
from modelpress_server.executors.turns import MeasuringTurns


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


async def settled() -> None:
    """Everything that can go on has gone on."""
    for _ in range(10):
        await asyncio.sleep(0)


async def test_the_others_stand_still_until_the_end(workers: list[Fake]) -> None:
    """A turn stops all but its holder, its end lets all go on."""
    gate = MeasuringTurns(lambda: workers)
    await gate.take(workers[0])
    assert [worker.paused for worker in workers] == [0, 1, 1]
    gate.release(workers[0])
    assert [worker.paused for worker in workers] == [0, 0, 0]


async def test_turns_come_in_order_and_one_at_a_time(workers: list[Fake]) -> None:
    """Two that wait are not stopped, for they do nothing; they get their turns in the order in which they asked."""
    gate = MeasuringTurns(lambda: workers)
    await gate.take(workers[0])
    second, third = (asyncio.create_task(gate.take(worker)) for worker in workers[1:])
    await settled()
    gate.release(workers[0])
    await settled()
    assert (second.done(), third.done()) == (True, False)
    gate.release(workers[1])
    await settled()
    assert third.done()


async def test_who_gives_up_waiting_leaves_the_queue(workers: list[Fake]) -> None:
    """A cancelled request does not keep the others waiting."""
    gate = MeasuringTurns(lambda: workers)
    await gate.take(workers[0])
    second, third = (asyncio.create_task(gate.take(worker)) for worker in workers[1:])
    await settled()
    second.cancel()
    gate.release(workers[0])
    await settled()
    assert third.done()


async def test_nobody_measures_while_a_worker_starts(workers: list[Fake]) -> None:
    """And nobody is started while somebody measures, or waits to."""
    gate = MeasuringTurns(lambda: workers)
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


async def test_a_turn_that_does_not_end_is_ended(workers: list[Fake], monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker that keeps its turn keeps the others for MAX_TURN_S at most, and for MAX_TASK_S in all its turns."""
    monkeypatch.setattr(turns, "MAX_TURN_S", 0.0)
    monkeypatch.setattr(turns, "MAX_TASK_S", 0.0)
    gate = MeasuringTurns(lambda: workers)
    await gate.take(workers[0])
    gate.release(workers[0])
    assert [worker.paused for worker in workers] == [0, 0, 0]
    await gate.take(workers[0])
    assert [worker.paused for worker in workers] == [0, 0, 0]


async def test_a_real_task_stands_still_and_pays_nothing(start_bench: Any) -> None:
    """While one worker measures, another one's counter does not move; neither its limit nor its own clock counts that
    time; then it goes on."""
    bench = await start_bench()
    counter, done = bench.root / "counter", bench.root / "done"
    counting = asyncio.create_task(bench.run("count:counter", Limits(time_s=30.0, memory_bytes=0)))
    await _until(counter.exists)
    measuring = asyncio.create_task(bench.run("measure:done", Limits(time_s=30.0, memory_bytes=0)))
    await _until(lambda: "measuring" in bench.lines)
    # One write may have been under way when it was stopped.
    before = await _number(counter)
    await asyncio.sleep(0.3)
    assert await _number(counter) == before
    done.touch()
    await measuring
    await _until(lambda: counter.read_text("ascii") not in ("", str(before)))
    (bench.root / "counter.stop").touch()
    event = await counting
    assert event.WhichOneof("event") == "compressed"
    answer = json.loads((bench.output / "answer.json").read_text("ascii"))
    assert answer["own_s"] < answer["wall_s"] - 0.25


class Standing:
    """A worker that has stood still for all of its time."""

    def __init__(self) -> None:
        self._began_s = time.monotonic()

    @property
    def paused_s(self) -> float:
        return time.monotonic() - self._began_s


async def test_a_limit_does_not_count_the_time_of_others() -> None:
    """A task that stands still does not reach its limit, however long that lasts."""
    limits = Limits(time_s=0.05, memory_bytes=0)
    run = _Run(Standing(), limits, lambda _: None, MeasuringTurns(lambda: ()), Clock())  # type: ignore[arg-type]
    over = asyncio.Event()
    work = asyncio.create_task(over.wait())
    ended = asyncio.create_task(run._until_time_is_up({work}))
    await asyncio.sleep(4 * limits.time_s)
    assert not ended.done()
    over.set()
    assert await ended == {work}


async def _number(path: Path) -> int:
    """What the counter stands at once it stands still."""
    numbers = [-1]
    while not (len(numbers) > 1 and numbers[-1] == numbers[-2]):
        await asyncio.sleep(0.05)
        numbers.append(int(await asyncio.to_thread(path.read_text, "ascii") or -1))
    return numbers[-1]


async def _until(condition: Any) -> None:
    async with asyncio.timeout(30):
        while not condition():  # noqa: ASYNC110  # the state of other processes has no event
            await asyncio.sleep(0.02)
