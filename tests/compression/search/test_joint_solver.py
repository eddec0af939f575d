"""Widths and forms as one choice: within the budget, and about as cheap as trying everything finds."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
from modelpress_compression.search.joint_solver import Form, Weight, Width, solve, total

FORMS = (Form(0.5, 0.02), Form(1.0, 0.001), Form(4.0, 0.0))
WIDTHS = (Width(0.0, 0.0), Width(0.5, 0.01), Width(0.75, 0.05))


def a_chain(seed: int) -> tuple[list[list[Width]], list[Weight]]:
    """Three layers in a row with two groups of channels between them, whose sizes and errors differ."""
    rng = np.random.default_rng(seed)
    scales = rng.uniform(0.2, 5.0, 5)
    groups = [[Width(width.gone, width.error * scale) for width in WIDTHS] for scale in scales[:2]]
    sizes = rng.integers(10, 1000, 3)
    axes: list[list[dict[int, float]]] = [[{0: 1.0}, {}], [{1: 1.0}, {0: 1.0}], [{}, {1: 1.0}]]
    weights = [
        Weight([Form(form.price * size, form.error * scale) for form in FORMS], own)
        for size, scale, own in zip(sizes, scales[2:], axes, strict=True)
    ]
    return groups, weights


def error_of(groups: list[list[Width]], weights: list[Weight], choice: tuple[int, ...] | list[int]) -> float:
    """What the errors of a choice add up to."""
    count = len(groups)
    own = sum(widths[place].error for widths, place in zip(groups, choice[:count], strict=True))
    return own + sum(weight.forms[place].error for weight, place in zip(weights, choice[count:], strict=True))


@pytest.mark.parametrize("budget", [0.01, 0.05, 0.2])
def test_it_comes_near_to_the_best_of_all_choices(budget: float) -> None:
    """Of 20 chains, all answers are within the budget; they cost 3 % more than the best in the mean, 25 % at most."""
    ratios = []
    for seed in range(20):
        groups, weights = a_chain(seed)
        found = solve(groups, weights, budget)
        assert found is not None
        assert error_of(groups, weights, found) <= budget
        everything = product(*(range(3) for _ in range(5)))
        sound = [choice for choice in everything if error_of(groups, weights, choice) <= budget]
        ratios.append(total(groups, weights, found) / min(total(groups, weights, choice) for choice in sound))
    assert np.mean(ratios) <= 1.03
    assert max(ratios) <= 1.25


def test_a_width_counts_by_the_bits_of_its_weights() -> None:
    """Cutting saves more where the weights are in float32: where bits are cheaper in error, they go first."""
    weights = [Weight([Form(1.0, 0.001), Form(8.0, 0.0)], [{0: 1.0}])]
    groups = [[Width(0.0, 0.0), Width(0.5, 0.004)]]
    assert solve(groups, weights, 0.004) == [0, 0]  # an eighth by bits, not half by width
    assert solve(groups, weights, 0.006) == [1, 0]
    assert solve(groups, weights, 0.0) == [0, 1]


def test_what_is_left_of_an_axis_that_groups_share() -> None:
    """Two groups own three and one quarters of an axis, the first one half of another one."""
    weight = Weight([Form(1.0, 0.0)], [{0: 0.75, 1: 0.25}, {0: 0.5}])
    assert weight.left([0.0, 0.0]) == 1.0
    assert weight.left([0.5, 1.0]) == pytest.approx((1 - 0.375 - 0.25) * (1 - 0.25))


def test_no_choice_within_the_budget() -> None:
    """None, where even the closest forms err more."""
    assert solve([], [Weight([Form(1.0, 0.1)], [{}])], 0.01) is None


def test_a_price_follows_its_curve() -> None:
    """Between what was measured on a line, beyond it as at its end; nothing costs nothing, curve or not."""
    kinked = Form(4.0, 0.0, ((0.25, 3.0), (0.5, 3.0), (1.0, 4.0)))
    assert [kinked.at(left) for left in (0.1, 0.25, 0.5, 0.75, 1.0)] == [3.0, 3.0, 3.0, 3.5, 4.0]
    assert kinked.at(0.0) == Form(4.0, 0.0).at(0.0) == 0.0
    assert Form(4.0, 0.0).at(0.5) == 2.0


def test_a_layer_that_is_not_faster_when_narrow_goes_as_a_whole() -> None:
    """Half of its channels save nothing by its curve, and the whole branch saves all of it for the same error."""
    weight = Weight([Form(4.0, 0.0, ((0.5, 4.0), (1.0, 4.0)))], [{0: 1.0}, {}, {1: 1.0}])
    groups = [[Width(0.0, 0.0), Width(0.5, 0.01)], [Width(0.0, 0.0), Width(1.0, 0.01)]]
    assert solve(groups, [weight], 0.01) == [0, 1, 0]
    assert total(groups, [weight], [0, 1, 0]) == 0.0
    assert solve(groups, [weight], 0.001) == [0, 0, 0]
