"""Work on several cores at once, in order."""

from __future__ import annotations

import threading

import pytest
from modelpress_compression import parallel
from modelpress_compression.parallel import AHEAD_BYTES, map_ahead, map_in_order, workers_within


@pytest.fixture(params=[1, 3])
def cores(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    count = int(request.param)
    monkeypatch.setattr(parallel, "available_cores", lambda: count)
    return count


def test_results_come_in_the_order_of_the_items(cores: int) -> None:
    """The first item ends last of those that run at once: it waits for the second where there are several cores."""
    second = threading.Event()

    def work(item: int) -> int:
        if item == 0 and cores > 1:
            assert second.wait(60)
        if item == 1:
            second.set()
        return item * item

    assert list(map_in_order(work, range(20))) == [item * item for item in range(20)]


def test_few_items_are_looked_ahead(cores: int) -> None:
    """However many there are, no more than one for each core and one more are taken before a result is handed out."""
    items = iter(range(1000))
    results = map_in_order(lambda item: item, items)
    assert next(results) == 0
    assert next(items) <= cores + 1
    results.close()


def test_an_error_ends_the_work_and_is_the_callers(cores: int) -> None:
    """The items behind it are not worked on, but for those that run already."""
    worked = []

    def work(item: int) -> int:
        worked.append(item)
        if item == 2:
            raise ValueError("two")
        return item

    with pytest.raises(ValueError, match="two"):
        list(map_in_order(work, range(1000)))
    assert len(worked) <= 3 + 2 * cores + 2


def test_as_many_work_as_memory_is_given_for(cores: int) -> None:
    """One at least, and no more than there are workers."""
    assert workers_within(100, 1000) == 1
    assert workers_within(100, 40) == min(2, cores)
    assert workers_within(100, 0) == cores
    assert list(map_in_order(abs, range(-5, 0), 1)) == [5, 4, 3, 2, 1]


@pytest.mark.parametrize("large", [False, True])
def test_large_results_are_made_one_at_a_time(large: bool, cores: int) -> None:
    """What is small is made ahead on several cores; a second large one only when the first is done with."""
    size, items = AHEAD_BYTES if large else 1, iter(range(1000))
    results = map_ahead(lambda item: item, items, lambda item: size)
    assert [next(results), next(results)] == [0, 1]
    ahead = 0 if large or cores == 1 else cores
    assert next(items) == 2 + ahead
    results.close()
    assert list(map_ahead(str, range(3), len)) == ["0", "1", "2"]
    assert not list(map_ahead(str, (), len))
