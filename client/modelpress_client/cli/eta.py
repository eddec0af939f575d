"""When something ends, guessed from how much of it is done: a figure that moves calmly.

    expected end = now + elapsed * (1 - fraction) / fraction

Progress is not even: a stage may take longer than its share. So a new guess moves the expected end by a part of the
difference only, the larger the longer the last one stood; and where nothing comes for long, the time left shrinks no
further than to a share of what the pace so far says, instead of reaching zero.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable

SHOWN_AFTER_S = 1.0
LEAST_DONE = 0.02  # of the whole: less says nothing of the pace
_CALM = 0.25  # a guess counts in full after some times this share of the time that has passed
_FLOOR = 0.25


class Eta:
    """The time left. `update` takes what is done, `left_s` may be asked at any moment."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._began: tuple[float, float] | None = None  # time and fraction of the first update
        self._updated_s = 0.0
        self._fraction = 0.0
        self._end_s: float | None = None

    def update(self, fraction: float) -> None:
        """`fraction`: share of the whole that is done, 0 to 1; one that is no larger than before changes nothing."""
        now_s = self._clock()
        if self._began is None:
            self._began, self._fraction, self._updated_s = (now_s, fraction), fraction, now_s
        if fraction <= self._fraction:
            return
        self._fraction = fraction
        guess_s = self._paced_s(now_s)
        if guess_s is None:
            return
        if self._end_s is None:
            self._end_s = now_s + guess_s
        else:
            weight = 1 - math.exp(-(now_s - self._updated_s) / (_CALM * (now_s - self._began[0])))
            self._end_s += weight * (now_s + guess_s - self._end_s)
        self._updated_s = now_s

    def left_s(self) -> float | None:
        """Seconds left; None where it is too early to say, or nothing is left."""
        now_s = self._clock()
        paced_s = self._paced_s(now_s)
        if paced_s is None or self._fraction >= 1:
            return None
        if self._end_s is None:
            return paced_s
        return max(self._end_s - now_s, _FLOOR * paced_s)

    def _paced_s(self, now_s: float) -> float | None:
        """What is left at the mean pace so far, as if something came just now."""
        if self._began is None:
            return None
        elapsed_s, done = now_s - self._began[0], self._fraction - self._began[1]
        if elapsed_s < SHOWN_AFTER_S or done < LEAST_DONE:
            return None
        return elapsed_s * (1 - self._fraction) / done


def left_text(left_s: float | None) -> str:
    """`about 20 s left`: in steps, so that it does not flicker; empty where it is not known."""
    if left_s is None:
        return ""
    for limit_s, step_s in ((10, 1), (60, 5), (600, 30)):
        if left_s <= limit_s:
            left_s = max(math.ceil(left_s / step_s) * step_s, 1)
            break
    minutes, seconds = divmod(round(left_s), 60)
    if left_s < 60:
        return f"about {seconds} s left"
    if left_s < 600:
        return f"about {minutes} min left" if seconds == 0 else f"about {minutes} min {seconds} s left"
    if left_s < 5400:
        return f"about {minutes} min left"
    return f"about {left_s / 3600:.1f} h left"
