"""News of jobs and of the queue, and looks that are shared."""

from __future__ import annotations

import asyncio

import pytest
from modelpress_server.waiting import QUEUE_NEWS_S, TOLD_IN_A_TURN, Notifier, SharedLook, Ticket, wait_until


def told(tickets: list[Ticket]) -> int:
    """How many have news."""
    return sum(ticket.is_set() for ticket in tickets)


async def all_told(tickets: list[Ticket]) -> float:
    """Returns when each has news; the time of the loop's clock."""
    async with asyncio.timeout(30):
        for ticket in tickets:
            await ticket.wait()
    return asyncio.get_running_loop().time()


async def test_a_change_of_the_queue_is_told_in_turns() -> None:
    """The first are told at once, the others later, and none as if it were news of its own job."""
    notifier = Notifier()
    tickets = [notifier.ticket(f"job{number}") for number in range(3 * TOLD_IN_A_TURN - 1)]
    for ticket in tickets:
        ticket.take()
    notifier.notify_queue()
    await tickets[0].wait()
    assert told(tickets) == TOLD_IN_A_TURN
    await all_told(tickets)
    assert not any(ticket.own for ticket in tickets)


async def test_a_change_while_others_are_told_of_the_last_one() -> None:
    """Everybody is told of it again, in a round of its own, which begins when a second has passed."""
    notifier = Notifier()
    tickets = [notifier.ticket(f"job{number}") for number in range(TOLD_IN_A_TURN + 1)]
    notifier.notify_queue()
    await tickets[0].wait()
    first_s = notifier.queue_told_s
    notifier.notify_queue()
    await all_told(tickets)
    for ticket in tickets:
        ticket.clear()
    await all_told(tickets)
    assert notifier.queue_told_s >= first_s + QUEUE_NEWS_S
    for ticket in tickets:
        ticket.clear()
    await asyncio.sleep(QUEUE_NEWS_S + 0.5)
    assert told(tickets) == 0


async def test_news_of_a_job_do_not_wait_for_a_turn() -> None:
    """Whoever watches it is told at once, and so is everybody when the server closes."""
    notifier = Notifier()
    tickets = [notifier.ticket(f"job{number}") for number in range(2 * TOLD_IN_A_TURN)]
    for ticket in tickets:
        ticket.take()
    notifier.notify_queue()
    notifier.notify("job7")
    assert told(tickets) == 1
    assert tickets[7].take()
    notifier.close()
    assert told(tickets) == len(tickets)


async def test_a_look_that_is_recent_enough_is_shared() -> None:
    """Whoever asks for what was found since a time gets the last look, if it began then or later; else a new one."""
    looks = 0

    async def look() -> int:
        nonlocal looks
        looks += 1
        await asyncio.sleep(0)
        return looks

    shared, clock = SharedLook(look), asyncio.get_running_loop()
    before_s = clock.time()
    assert await asyncio.gather(*(shared.since(before_s) for _ in range(5))) == [1] * 5
    assert await shared.since(before_s) == 1
    assert await shared.since(clock.time() + 1e-6) == 2
    assert await shared() == 3


async def test_nobody_looks_again_at_what_has_not_changed() -> None:
    """While the version stays, the last look serves all; a change during a look has the next one look again."""
    version: int | None = 1
    looks = 0

    async def look() -> int:
        nonlocal looks, version
        looks += 1
        if looks == 2:
            assert version is not None
            version += 1  # after it began: what it finds may be older
        await asyncio.sleep(0)
        return looks

    shared = SharedLook(look, lambda: version)
    assert [await shared() for _ in range(3)] == [1] * 3
    version = 2
    assert [await shared() for _ in range(4)] == [2, 3, 3, 3]
    version = None
    assert [await shared() for _ in range(2)] == [4, 5]


@pytest.mark.parametrize("news_first", [True, False])
async def test_news_do_not_hide_a_cancellation(news_first: bool) -> None:
    """Who is cancelled while the event is set ends all the same, whichever comes first."""
    event = asyncio.Event()
    waiting = asyncio.create_task(wait_until(event, 60.0))
    await asyncio.sleep(0.01)
    for step in (event.set, waiting.cancel) if news_first else (waiting.cancel, event.set):
        step()
    with pytest.raises(asyncio.CancelledError):
        await waiting


async def test_waiting_tells_whether_there_was_news() -> None:
    """True as soon as the event is set, False when the time is over."""
    event = asyncio.Event()
    assert not await wait_until(event, 0.01)
    event.set()
    assert await wait_until(event, 60.0)
