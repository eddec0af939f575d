"""Which option each part of a model gets: the least total price within a budget of error.

Each part (a weight, a layer) has some options, each with a price (bytes, milliseconds) and an error at the outputs.
Errors of different parts add up, as those of roundings do, so that this is the multiple-choice knapsack problem. It is
solved by dynamic programming over the error in steps, as in SPDY (arXiv:2201.13096) and ZipLM (arXiv:2302.04089):

    least[k, e] = min over the options o of part k:   price(o) + least[k - 1, e - error(o)]

Errors are rounded up to whole steps, so that what is found never exceeds the budget; with `STEPS` steps a part, the
rounding takes at most 1 / `STEPS` of the budget away.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

STEPS = 16  # of the budget, for each part
MIN_STEPS, MAX_STEPS = 1024, 16384


@dataclass(frozen=True)
class Option:
    """`price`: what it costs, at least 0. `error`: at the outputs, as a share of their power; infinite: never."""

    price: float
    error: float


def cheapest(parts: Sequence[Sequence[Option]], budget: float) -> list[int] | None:
    """For each part the place of its option, of the least total price among those whose errors are within the budget.

    None: no choice is within it. Raises ValueError for a part without options.
    """
    if any(not options for options in parts):
        raise ValueError("Every part needs an option.")
    if not parts:
        return []
    steps = int(np.clip(STEPS * len(parts), MIN_STEPS, MAX_STEPS))
    least = np.zeros(steps + 1)
    chosen = np.zeros((len(parts), steps + 1), np.uint8)
    for part, options in enumerate(parts):
        found = np.full(steps + 1, np.inf)
        for place, option in enumerate(options):
            used = _steps(option.error, budget, steps)
            if used is None:
                continue
            price = np.full(steps + 1, np.inf)
            price[used:] = least[: steps + 1 - used] + option.price
            better = price < found
            found[better], chosen[part][better] = price[better], place
        least = found
    if not np.isfinite(least[steps]):
        return None
    left, choice = steps, []
    for part in range(len(parts) - 1, -1, -1):
        place = int(chosen[part, left])
        choice.append(place)
        left -= _steps(parts[part][place].error, budget, steps) or 0
    return choice[::-1]


def _steps(error: float, budget: float, steps: int) -> int | None:
    """How many steps of the budget an error takes; None: more than there are."""
    if error <= 0:
        return 0
    if not error <= budget:  # also where it is not a number
        return None
    return int(np.ceil(error / budget * steps))
