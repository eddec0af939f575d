"""How long a search goes on.

    --search-time    so long
    far, without     USUAL_S; or TIMES_FIRST times what the first candidate took, where that is longer: every candidate
                     of a large model takes longer, and who has one waits longer for all of them
    not far          no limit: some ten candidates, and no training

The time holds within a candidate too: what is built when it is up is left unfinished, and each training gets a part of
what is left. Whatever the time, there is one candidate.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

from modelpress_compression.errors import TimeLimitError
from modelpress_compression.passes.base import Context

USUAL_S = 240.0
TIMES_FIRST = 30


class SearchTime:
    """Of a search that begins when this is made. `asked_s`: its limit; None: the usual one, where it is `far`.

    `untried`: how many models the end of the time has left out, at the most.
    """

    def __init__(self, asked_s: float | None, *, far: bool) -> None:
        self._began_s = time.monotonic()
        self._is_usual = asked_s is None
        self._first_s: float | None = None
        self.limit_s = math.inf if asked_s is None else asked_s
        self.untried = 0
        if far:
            self.goes_far()

    def goes_far(self) -> None:
        """What comes from now on is a far search."""
        if self._is_usual:
            self.limit_s = self.taken_s + max(USUAL_S, TIMES_FIRST * (self._first_s or 0.0))

    def first_is_built(self) -> None:
        """There is a candidate, so that it is known how long one takes. Later ones change nothing."""
        if self._first_s is None:
            self._first_s = self.taken_s
            if self._is_usual and self.limit_s < math.inf:
                self.limit_s = max(self.limit_s, TIMES_FIRST * self._first_s)

    @property
    def taken_s(self) -> float:
        """Seconds since the search began."""
        return time.monotonic() - self._began_s

    @property
    def left_s(self) -> float:
        """Seconds until the search ends; infinite where it has no limit."""
        return self.limit_s - self.taken_s

    @property
    def share_left(self) -> float:
        """Of the whole search, from 1 down to 0; 1 where it has no limit."""
        return 1.0 if math.isinf(self.limit_s) else max(0.0, self.left_s / self.limit_s)

    def has_left_out(self, models: int, kept_s: float = 0.0) -> bool:
        """Whether the time is up, but for what is kept for others. So many models at the most are then not tried."""
        is_up = self.left_s <= kept_s
        self.untried += max(0, models) if is_up else 0
        return is_up

    def within(self, context: Context) -> Context:
        """The context, whose time ends with that of the search."""
        if math.isinf(self.limit_s):
            return context
        deadline = context.clock() + self.left_s
        return replace(context, deadline=deadline if context.deadline is None else min(context.deadline, deadline))

    @contextmanager
    def lasts(self, context: Context) -> Iterator[None]:
        """What is begun within ends with the time for the search, not with an error. Raises TimeLimitError where the
        job's time is up, which is that of the `context`."""
        try:
            yield
        except TimeLimitError:
            context.check_time()
            self.untried += 1
            context.log("the time for the search was up in the middle of a candidate")

    def facts(self) -> dict[str, float | int | None]:
        """The report's section."""
        limit_s = None if math.isinf(self.limit_s) else self.limit_s
        return {"time_s": self.taken_s, "limit_s": limit_s, "untried": self.untried}

    def share(self, built: float) -> float:
        """How much of the search is done: `built`, the share of its candidates, or of its time where that is limited,
        since then nobody knows how many there will be."""
        return built if math.isinf(self.limit_s) else min(1.0, self.taken_s / self.limit_s)
