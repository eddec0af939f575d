"""How wide each group of channels stays and which form each weight gets, as one choice.

What a weight costs in a form depends on what is left of it, so that the price of a width depends on the forms of the
weights that it narrows, and the other way round:

    total = sum over weights   price(form, left),    left = product over axes (1 - sum over groups   owned * gone)

Bytes are in proportion to what is left; times are not, and were measured at some shares.

With everything else as it is, each option of a part has a price, and all parts together are the multiple-choice
knapsack of `solver`. Its answer changes the prices: they are taken anew, and it is solved again, until nothing changes.
Every answer is within the budget, and the cheapest of them by its own total is taken. Compare ZipLM
(arXiv:2302.04089), whose structures share no weights, so that one solution is enough there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod

import numpy as np

from modelpress_compression.search.solver import Option, cheapest

_SOLUTIONS = 8


@dataclass(frozen=True)
class Width:
    """A group without the share `gone` of its units, and the error that this makes at the outputs."""

    gone: float
    error: float


@dataclass(frozen=True)
class Form(Option):
    """Of a weight, with its price at full width. `curve`: pairs of a share of the weight that is left, rising, and the
    price there; none: prices are in proportion to the share."""

    curve: tuple[tuple[float, float], ...] = ()

    def at(self, left: float) -> float:
        """Its price where so much of the weight is left; beyond the curve, that of its nearer end. None left: none."""
        if not self.curve or not left:
            return self.price * left
        shares, prices = zip(*self.curve, strict=True)
        return float(np.interp(left, shares, prices))


@dataclass(frozen=True)
class Weight:
    """`forms`: that it may have. `axes`: of each axis, the share that each group owns, by its place."""

    forms: Sequence[Form]
    axes: Sequence[Mapping[int, float]]

    def left(self, gone: Sequence[float]) -> float:
        """The share of the weight that is left, where so much of each group has gone."""
        return prod(1 - sum(owned * gone[group] for group, owned in axis.items()) for axis in self.axes)


def solve(groups: Sequence[Sequence[Width]], weights: Sequence[Weight], budget: float) -> list[int] | None:
    """The place of each group's width, then of each weight's form, of the least total that was found within the budget.

    None: no choice is within it. The first width of a group is the one that nothing has gone from.
    """
    current = [0] * len(groups) + [_closest(weight.forms) for weight in weights]
    best: tuple[float, list[int]] | None = None
    for _ in range(_SOLUTIONS):
        choice = cheapest(_parts(groups, weights, current), budget)
        if choice is None:
            return None
        cost = total(groups, weights, choice)
        if best is None or cost < best[0]:
            best = cost, choice
        if choice == current:
            break
        current = choice
    return best[1] if best is not None else None


def total(groups: Sequence[Sequence[Width]], weights: Sequence[Weight], choice: Sequence[int]) -> float:
    """What a choice costs."""
    gone = [widths[place].gone for widths, place in zip(groups, choice, strict=False)]
    forms = choice[len(groups) :]
    return sum(weight.forms[place].at(weight.left(gone)) for weight, place in zip(weights, forms, strict=True))


def _parts(groups: Sequence[Sequence[Width]], weights: Sequence[Weight], current: Sequence[int]) -> list[list[Option]]:
    """The options of all parts, each priced with the others as they are."""
    gone = [widths[place].gone for widths, place in zip(groups, current, strict=False)]
    forms = [weight.forms[place] for weight, place in zip(weights, current[len(groups) :], strict=True)]
    parts = []
    for number, widths in enumerate(groups):
        narrowed = [pair for pair in zip(weights, forms, strict=True) if any(number in axis for axis in pair[0].axes)]
        options = []
        for width in widths:
            changed = [*gone[:number], width.gone, *gone[number + 1 :]]
            options.append(Option(sum(form.at(weight.left(changed)) for weight, form in narrowed), width.error))
        parts.append(options)
    for weight in weights:
        left = weight.left(gone)
        parts.append([Option(form.at(left), form.error) for form in weight.forms])
    return parts


def _closest(forms: Sequence[Form]) -> int:
    return min(range(len(forms)), key=lambda place: (forms[place].error, forms[place].price))
