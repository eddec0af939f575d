"""The solver finds the cheapest choice within a budget of error."""

from __future__ import annotations

from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st
from modelpress_compression.search.solver import STEPS, Option, cheapest

OPTIONS = st.builds(
    Option,
    price=st.integers(0, 1000).map(float),
    error=st.one_of(st.just(0.0), st.floats(1e-6, 1.0)),
)
PARTS = st.lists(st.lists(OPTIONS, min_size=1, max_size=3), min_size=1, max_size=5)


def totals(parts: list[list[Option]], choice: tuple[int, ...] | list[int]) -> tuple[float, float]:
    taken = [options[place] for options, place in zip(parts, choice, strict=True)]
    return sum(one.price for one in taken), sum(one.error for one in taken)


@given(PARTS, st.floats(1e-3, 3.0))
def test_it_is_within_the_budget_and_nothing_cheaper_is_clearly_so(parts: list[list[Option]], budget: float) -> None:
    """Against all choices: what it finds holds the budget, and beats each that holds it with the steps' room to
    spare."""
    found = cheapest(parts, budget)
    every = [totals(parts, choice) for choice in product(*(range(len(options)) for options in parts))]
    roomy = [price for price, error in every if error <= budget * (1 - 1 / STEPS)]
    if found is None:
        assert not roomy
        return
    price, error = totals(parts, found)
    assert error <= budget * (1 + 1e-9)
    assert all(price <= other for other in roomy)


def test_a_budget_of_nothing_takes_what_does_not_err() -> None:
    """And where everything errs there is no choice."""
    exact, cheap = Option(4.0, 0.0), Option(1.0, 0.1)
    assert cheapest([[cheap, exact], [exact]], 0.0) == [1, 0]
    assert cheapest([[cheap]], 0.0) is None
    assert cheapest([[Option(1.0, float("nan")), exact]], 1.0) == [1]


def test_parts_need_options() -> None:
    """No parts, no choice; a part without options is a mistake of the caller's."""
    assert cheapest([], 1.0) == []
    with pytest.raises(ValueError, match="needs an option"):
        cheapest([[]], 1.0)


def test_many_parts() -> None:
    """A thousand weights: those that err most for what they save stay whole."""
    parts = [[Option(1.0, place * 1e-6), Option(2.0, 0.0)] for place in range(1000)]
    found = cheapest(parts, 1e-6 * sum(range(500)))
    assert found is not None
    cheap = [place for place, chosen in enumerate(found) if chosen == 0]
    assert 480 <= len(cheap) <= 500
    assert max(cheap) < 600  # errors are rounded up to steps
