"""Prices choose what is built; what is measured decides how far to go."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
from modelpress_compression import Model
from modelpress_compression.passes.quantize.config import QuantizeConfig
from modelpress_compression.recipe import Step
from modelpress_compression.search.budgets import by_budget, decibels
from modelpress_compression.search.candidates import Candidate
from modelpress_compression.search.solver import Option
from modelpress_compression.search.steps import StepRecord

# Twenty weights of one size, in 4 bits or 8; their errors in 4 bits rise.
PARTS = [[Option(4.0, (place + 1) * 1e-3), Option(8.0, 1e-5)] for place in range(20)]


@pytest.fixture
def record(digits: Model) -> StepRecord:
    return StepRecord(Step("quantize", QuantizeConfig()), digits, Path("digits.onnx"))


class Judge:
    """Refuses what errs by more than `permitted`, at `worse` times what the prices say."""

    def __init__(self, record: StepRecord, permitted: float, worse: float = 1.0) -> None:
        self.record, self.permitted, self.worse = record, permitted, worse
        self.built: list[tuple[float, bool]] = []  # price, and whether it holds

    def __call__(self, choice: Sequence[int]) -> Candidate:
        taken = [options[place] for options, place in zip(PARTS, choice, strict=True)]
        holds = self.worse * sum(option.error for option in taken) <= self.permitted
        self.built.append((sum(option.price for option in taken), holds))
        return Candidate("weight_only", self.record, 1, reason="" if holds else "lost")


@pytest.mark.parametrize("worse", [0.5, 1.0, 3.0])
def test_it_comes_near_to_the_cheapest_that_holds(record: StepRecord, worse: float) -> None:
    """However wrong the prices are as a whole: within an eighth of the best, after five models."""
    judge = Judge(record, permitted=0.05, worse=worse)
    list(by_budget(PARTS, judge))
    best = min(
        80 + 4 * (20 - count)
        for count in range(21)
        if worse * (sum(range(1, count + 1)) * 1e-3 + (20 - count) * 1e-5) <= 0.05
    )
    assert len(judge.built) <= 5
    assert best <= min(price for price, holds in judge.built if holds) <= best * 1.125


def test_the_cheapest_of_all_ends_the_search(record: StepRecord) -> None:
    """Where it holds, nothing else is built."""
    judge = Judge(record, permitted=1.0)
    assert [candidate.reason for candidate in by_budget(PARTS, judge)] == [""]
    assert judge.built == [(80.0, True)]


def test_where_nothing_holds_it_ends(record: StepRecord) -> None:
    """After as many models as it may build."""
    judge = Judge(record, permitted=0.0)
    assert all(candidate.reason for candidate in by_budget(PARTS, judge))
    assert 1 < len(judge.built) <= 5


def test_no_error_is_many_decibels() -> None:
    """And not infinitely many, between which nothing could be halved."""
    assert decibels(0.0) == pytest.approx(90.0)
    assert decibels(0.01) == pytest.approx(20.0)
