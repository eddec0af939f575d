"""Whose turn it is: start-time fair queueing (Goyal, Vin, Cheng 1996) over projects.

Each project has a virtual time: the seconds that its work has run, divided by its weight. The waiting project with the
least under way, then with the lowest virtual time, is next. The time of whoever was started last is the floor: one
that was idle begins there, so that it neither makes up for its pause nor waits for what others did before it came.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence

# Work that ends at once is not free: else a project could have any amount of it before others have their turn.
MIN_CHARGE_S = 0.1


class FairShare:
    """The shares of one kind of work.

    `weight`: of a project, more than 0. `most_running`: how much of a project may be under way; 0: no limit.
    """

    def __init__(self, weight: Callable[[str], float], most_running: Callable[[str], int]) -> None:
        self._weight = weight
        self._most_running = most_running
        self._times_s: dict[str, float] = {}
        self._running: Counter[str] = Counter()
        self._floor_s = 0.0

    def rank(self, waiting: Sequence[str]) -> list[str]:
        """The projects that may start something, the next one first; among equals the order of `waiting` holds."""
        # Who is at the floor or below it begins there, as one that never was here.
        self._times_s = {project: time_s for project, time_s in self._times_s.items() if time_s > self._floor_s}
        return sorted((project for project in waiting if self._may_start(project)), key=self._turn)

    def started(self, project: str) -> None:
        """Something of the project has begun."""
        self._running[project] += 1
        self._floor_s = max(self._floor_s, self._time_s(project))

    def ended(self, project: str, duration_s: float) -> None:
        """Something of the project has ended after so long."""
        self._running -= Counter((project,))
        charge_s = max(duration_s, MIN_CHARGE_S) / self._weight(project)
        self._times_s[project] = self._time_s(project) + charge_s

    def _may_start(self, project: str) -> bool:
        most = self._most_running(project)
        return most == 0 or self._running[project] < most

    def _turn(self, project: str) -> tuple[float, float]:
        return self._running[project] / self._weight(project), self._time_s(project)

    def _time_s(self, project: str) -> float:
        return self._times_s.get(project, self._floor_s)
