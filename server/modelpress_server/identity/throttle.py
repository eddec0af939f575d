"""Token buckets: so many at once, so many a second on average."""

from __future__ import annotations

from collections import OrderedDict

MAX_KEYS = 10_000


class Throttle:
    """A bucket for each key, full at first. The least used are forgotten beyond MAX_KEYS: they are full again."""

    def __init__(self) -> None:
        self._buckets: OrderedDict[str, tuple[float, float]] = OrderedDict()  # key -> tokens left, at a time

    def wait_s(self, key: str, now_s: float, burst: float, per_s: float) -> float:
        """0 where there is one more to take now; else how long until there is."""
        left = self._left(key, now_s, burst, per_s)
        return 0.0 if left >= 1 else (1 - left) / per_s

    def take(self, key: str, now_s: float, burst: float, per_s: float) -> None:
        """Takes one."""
        self._buckets[key] = max(0.0, self._left(key, now_s, burst, per_s) - 1), now_s
        self._buckets.move_to_end(key)
        if len(self._buckets) > MAX_KEYS:
            self._buckets.popitem(last=False)

    def _left(self, key: str, now_s: float, burst: float, per_s: float) -> float:
        left, at_s = self._buckets.get(key, (burst, now_s))
        return min(burst, left + (now_s - at_s) * per_s)
