"""From prices to models: the cheapest choice within a budget of error, with the budget found by measuring.

The cheapest choice of all is built and judged first. Where it does not keep the answers, the budget is halved, on a
scale of decibels, between its error and that of the closest choice, and every model is judged as a whole: prices
choose, they decide nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial

from modelpress_compression import decibels as ratios
from modelpress_compression.search.candidates import Candidate
from modelpress_compression.search.solver import Option, cheapest

HALVINGS = 4
# Beside the error of the cheapest choice: what the solver's steps take away.
_SLACK_DB = 0.3
# What errs less rounds to the same answer in nearly all cases: no budget need be smaller.
CLOSE_DB = 40.0
# Less is no error: what is exact would be infinitely far.
_EXACT_DB = 90.0


def by_budget(
    parts: Sequence[Sequence[Option]], build: Callable[[Sequence[int]], Candidate | None], halvings: int = HALVINGS
) -> Iterator[Candidate]:
    """Candidates of cheaper and dearer choices, each built and judged by `build`, which gets the option of each part;
    None: that choice, and all that are dearer, is not worth building.

    The last one that keeps the answers is the cheapest that was found.
    """
    most = sum(min(options, key=lambda option: option.price).error for options in parts)
    least = sum(min(option.error for option in options) for options in parts)
    low, high = decibels(most) - _SLACK_DB, min(decibels(least), CLOSE_DB)
    yield from between(low, high, partial(cheapest, parts), build, halvings)


def between(
    low: float,
    high: float,
    solve: Callable[[float], Sequence[int] | None],
    build: Callable[[Sequence[int]], Candidate | None],
    halvings: int = HALVINGS,
) -> Iterator[Candidate]:
    """The same for whoever solves otherwise: `solve` gives the cheapest choice within an error. `low`, `high`: decibels
    of the first choice, and of one that is close enough."""
    tried: set[tuple[int, ...]] = set()
    budget_db = low
    for _ in range(1 + halvings):
        choice = solve(ratios.power_share(budget_db))
        if choice is None or tuple(choice) in tried:
            return
        tried.add(tuple(choice))
        candidate = build(choice)
        if candidate is None:
            return
        yield candidate
        if candidate.reason:
            low = budget_db
        elif budget_db == low:
            return  # nothing is cheaper
        else:
            high = budget_db
        budget_db = (low + high) / 2


def decibels(error: float) -> float:
    """A share of the outputs' power as a signal-to-noise ratio, on the scale of budgets."""
    return ratios.decibels(error, least=-math.inf, most=_EXACT_DB)
