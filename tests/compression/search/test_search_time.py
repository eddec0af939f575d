"""A search has the time that was asked for, or a usual one where it goes far; the end is no error."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from modelpress_compression import InputData
from modelpress_compression.errors import TimeLimitError
from modelpress_compression.passes.base import Context
from modelpress_compression.search import search_time
from modelpress_compression.search.search_time import TIMES_FIRST, USUAL_S, SearchTime


class Clock:
    """Shows what it is set to."""

    now_s = 100.0

    def monotonic(self) -> float:
        return self.now_s


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(search_time, "time", made)
    return made


def test_who_asks_gets_that_time(clock: Clock) -> None:
    """Far or not, and however long the first candidate takes."""
    for far in (False, True):
        search = SearchTime(10.0, far=far)
        clock.now_s += 4
        search.first_is_built()
        assert search.left_s == 6
        clock.now_s += 6
        assert search.left_s == 0


def test_a_far_search_has_the_usual_time(clock: Clock) -> None:
    """More where the first candidate takes long; those after it change nothing."""
    quick, slow = SearchTime(None, far=True), SearchTime(None, far=True)
    clock.now_s += 1
    quick.first_is_built()
    clock.now_s += 99
    slow.first_is_built()
    quick.first_is_built()
    assert quick.limit_s == USUAL_S
    assert slow.limit_s == 100 * TIMES_FIRST


def test_a_search_that_goes_far_later_has_it_from_then_on(clock: Clock) -> None:
    """Before that it has no limit."""
    search = SearchTime(None, far=False)
    clock.now_s += 1
    search.first_is_built()
    clock.now_s += 49
    assert search.left_s == math.inf
    assert search.share(0.3) == 0.3
    assert search.facts() == {"time_s": 50, "limit_s": None, "untried": 0}
    search.goes_far()
    assert search.left_s == USUAL_S
    assert search.share(0.3) == 50 / (50 + USUAL_S)


def test_the_share_that_is_left(clock: Clock) -> None:
    """All of it where there is no limit, none once it is over."""
    assert SearchTime(None, far=False).share_left == 1
    search = SearchTime(10.0, far=False)
    clock.now_s += 4
    assert search.share_left == pytest.approx(0.6)
    clock.now_s += 7
    assert search.share_left == 0


def test_what_the_end_leaves_out_is_counted(clock: Clock, samples: InputData, tmp_path: Path) -> None:
    """Nothing before it; a candidate that it interrupts is one, without an error."""
    search, context = SearchTime(10.0, far=False), Context(samples, tmp_path)
    assert not search.has_left_out(3)
    limited = search.within(context)
    assert limited.time_left_s == pytest.approx(10, abs=1)
    clock.now_s += 11
    with search.lasts(context):
        search.within(context).check_time()
    assert search.has_left_out(3)
    assert search.has_left_out(-1)
    assert search.untried == 4
    longer = SearchTime(20.0, far=False)
    assert not longer.has_left_out(1, kept_s=19.0)
    assert longer.has_left_out(1, kept_s=20.0)


def test_the_end_of_the_job_is_an_error(samples: InputData, tmp_path: Path) -> None:
    """The search may last longer than the job."""
    context = Context(samples, tmp_path, deadline=-1.0)
    search = SearchTime(10.0, far=False)
    with pytest.raises(TimeLimitError), search.lasts(context):
        search.within(context).check_time()
