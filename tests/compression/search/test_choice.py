"""What each objective takes, and that noise does not decide what a measured difference can."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from modelpress_compression.recipe import OBJECTIVES
from modelpress_compression.search.choice import (
    MAX_SLOWDOWN,
    SAME_SIZE,
    Figures,
    Limits,
    choose,
    contenders,
    settled,
)

ROUNDS = 30


def figures(
    name: str, size: int, time_ms: float, error: float = 1e-3, *, refusal: str = "", seed: int = 0, noise: float = 0.01
) -> Figures:
    """A candidate whose times lie around `time_ms`."""
    rng = np.random.default_rng([seed, *name.encode()])
    times_s = time_ms / 1e3 * rng.uniform(1 - noise, 1 + noise, ROUNDS)
    return Figures(name, size, times_s, error, refusal=refusal)


ORIGINAL = figures("original", 1_000_000, 10.0, error=0.0)
STORED = figures("stored", 280_000, 10.0)
STATIC = figures("static", 270_000, 5.0, error=5e-3)
SMALL = figures("small", 150_000, 13.0, error=8e-3)
CLOSE = figures("close", 290_000, 9.0, error=5e-5)
ALL = (ORIGINAL, STORED, STATIC, SMALL, CLOSE)


@pytest.mark.parametrize(
    ("objective", "taken"),
    [("balanced", "static"), ("smallest", "small"), ("fastest", "static"), ("accurate", "close")],
)
def test_each_objective_takes_its_best(objective: str, taken: str) -> None:
    """Size times time, size, time, closeness; every other candidate has a reason."""
    choice = choose(ALL, 0, objective)
    assert ALL[choice.taken].name == taken
    assert [not reason for reason in choice.reasons] == [one.name == taken for one in ALL]


def test_a_smaller_file_at_the_same_speed_is_taken() -> None:
    """3.5 times smaller and neither faster nor slower: balanced takes it, the original does not come back."""
    assert choose((ORIGINAL, STORED), 0, "balanced").taken == 1


def test_the_fastest_is_not_slow_where_times_scatter() -> None:
    """A smaller file that takes 11 % more time is not taken for as fast, however wide the interval is; one that
    computes as the fastest does is, whatever was measured."""
    fused = replace(figures("fused", 995_000, 10.0, noise=0.4), kernels="fused")
    slow = figures("static", 270_000, 11.1, noise=0.4)
    assert slow.times_of(fused).low <= 1.02
    assert choose((ORIGINAL, fused, slow), 0, "fastest").taken != 2
    stored = replace(slow, kernels="fused")
    assert choose((ORIGINAL, fused, stored), 0, "fastest").taken == 2


def test_what_computes_the_same_is_no_slower() -> None:
    """Weights that are only stored otherwise seem 8 % slower than the same model with its weights in float32: noise."""
    fused = replace(figures("fused", 995_000, 10.0), kernels="fused")
    seems_slow = replace(figures("stored", 280_000, 10.8), kernels="fused")
    models = (replace(ORIGINAL, kernels="original"), fused, seems_slow)
    assert choose(models, 0, "balanced").taken == 2
    assert choose((models[0], fused, replace(seems_slow, kernels="own")), 0, "balanced").taken != 2
    # Of a model that fusing leaves as it is, they compute as the original.
    assert choose((replace(ORIGINAL, kernels="fused"), seems_slow), 0, "balanced").taken == 1
    slow = replace(fused, times_s=fused.times_s * 1.08)
    assert choose((models[0], slow, seems_slow), 0, "balanced").taken == 0


def test_a_slower_file_that_is_hardly_smaller_is_not() -> None:
    """0.1 % smaller at 1.12 times the time: the original stays."""
    worse = figures("worse", 999_000, 11.2)
    choice = choose((ORIGINAL, worse), 0, "balanced")
    assert choice.taken == 0
    assert "time" in choice.reasons[1]


def test_what_is_as_good_as_another_must_still_be_better_than_the_original() -> None:
    """2 % smaller and 4 % slower is no gain, however near the two products lie."""
    assert choose((ORIGINAL, figures("neither", 980_000, 10.4)), 0, "balanced").taken == 0


def test_times_near_a_bound_are_measured_again() -> None:
    """What is 5 % slower than the original, or 6 % worse than the best, runs on; what is 20 % slower does not."""
    near, far = figures("near", 260_000, 10.5), figures("far", 200_000, 12.0)
    second, third = figures("second", 294_000, 10.1), figures("third", 340_000, 10.1)
    assert contenders((ORIGINAL, STORED, near, far, second, third), 0, "balanced", Limits()) == [1, 2, 4]


def test_what_lies_on_a_bound_is_not_settled() -> None:
    """The smaller of two may be 2.9 % slower: at 3 % the next rounds may say otherwise, at 0 and at 7 % they will not.
    The same holds where the smaller of two has a product about as good as the best."""
    for slowdown, sure in ((1.03, False), (1.0, True), (1.07, True)):
        edge = figures("edge", 200_000, 10.0 * slowdown, noise=1e-3)
        assert settled((ORIGINAL, STORED, edge), 0, "balanced", Limits()) == sure
    for product, sure in ((1.03, False), (1.0, True), (1.07, True)):
        faster = figures("faster", 300_000, 10.0 * 280 / 300 / product, noise=1e-3)
        assert settled((ORIGINAL, STORED, faster), 0, "balanced", Limits()) == sure


def test_what_scatters_is_not_settled() -> None:
    """The smaller of two seems 5 % slower, and must not be over 2.9 %: whether the next rounds may say otherwise, its
    interval tells."""
    for noise, sure in ((0.3, False), (1e-3, True)):
        edge = figures("edge", 200_000, 10.5, noise=noise)
        assert edge.times_of(ORIGINAL).median > 1.03 * 1.01
        assert settled((ORIGINAL, STORED, edge), 0, "balanced", Limits()) == sure


def test_nothing_comes_back_unchanged_for_a_few_rounds() -> None:
    """What seems 20 % slower is timed again where the original would come back without it, if its product is better."""
    slow, larger = figures("slow", 280_000, 12.0), figures("larger", 990_000, 12.0)
    assert contenders((ORIGINAL, slow, larger), 0, "balanced", Limits()) == [0, 1]
    assert contenders((ORIGINAL, larger), 0, "balanced", Limits()) == [0]


def test_what_cannot_be_told_from_the_original_is_not_slow() -> None:
    """On a busy machine what is as fast may seem 4 % slower in the median: the file comes back smaller all the same."""
    rng = np.random.default_rng(3)
    times_s = ORIGINAL.times_s * rng.choice([0.9, 1.04, 1.3], ROUNDS)
    stored = Figures("stored", 280_000, times_s, 1e-3)
    assert stored.times_of(ORIGINAL).median > 1.03
    assert choose((ORIGINAL, stored), 0, "balanced").taken == 1
    # Where another is as fast, the machine is no excuse: an idle one would not take it either.
    assert choose((ORIGINAL, replace(stored, size_bytes=200_000), STORED), 0, "balanced").taken == 2


def test_less_than_a_microsecond_is_no_reason_to_stay_large() -> None:
    """Of a run of 11 microseconds .4 more are what another place in memory takes; of one of 1 ms so many percent are
    not."""
    for time_ms, taken in ((0.011, 1), (1.0, 0)):
        original = figures("original", 60_000, time_ms, noise=1e-3)
        stored = figures("stored", 16_000, time_ms * 1.035, noise=1e-3)
        assert choose((original, stored), 0, "balanced").taken == taken


def test_balanced_is_never_clearly_slower_than_the_original() -> None:
    """Half the size at 1.3 times the time has the better product, and is refused all the same."""
    assert choose((ORIGINAL, figures("slow", 500_000, 13.0)), 0, "balanced").taken == 0


def test_refused_answers_are_not_taken_for_any_objective() -> None:
    """However small and fast."""
    broken = figures("broken", 1_000, 0.1, refusal="its answers differ")
    for objective in OBJECTIVES:
        choice = choose((ORIGINAL, STORED, broken), 0, objective)
        assert choice.taken != 2
        assert choice.reasons[2] == "its answers differ"


def test_limits_come_before_the_objective() -> None:
    """The most accurate of those that are small enough."""
    choice = choose(ALL, 0, "accurate", Limits(max_size_bytes=275_000))
    assert ALL[choice.taken].name in ("static", "small")
    assert not choice.unmet
    assert choice.reasons[0] == "misses max_size_bytes"


def test_the_nearest_is_taken_where_no_candidate_holds_the_limits() -> None:
    """And the choice says by how much it misses."""
    choice = choose(ALL, 0, "balanced", Limits(max_size_bytes=100_000))
    assert ALL[choice.taken].name == "small"
    assert choice.unmet == {"max_size_bytes": pytest.approx(1.5)}
    fast = choose(ALL, 0, "smallest", Limits(min_speedup=4.0))
    assert ALL[fast.taken].name == "static"
    assert fast.unmet["min_speedup"] == pytest.approx(2.0, rel=0.02)


def test_what_latency_cannot_tell_apart_is_decided_by_size() -> None:
    """Ten measurements of two candidates that are as fast: the smaller one, ten times."""
    for seed in range(10):
        larger = figures("larger", 300_000, 5.0, seed=seed, noise=0.03)
        smaller = figures("smaller", 290_000, 5.02, seed=seed + 100, noise=0.03)
        assert choose((ORIGINAL, larger, smaller), 0, "fastest").taken == 2


def test_what_size_cannot_tell_apart_either_is_decided_by_error() -> None:
    """As large to within 1 % and as fast: the closer one."""
    near = figures("near", 271_000, 5.0, error=1e-3)
    assert choose((ORIGINAL, STATIC, near), 0, "fastest").taken == 2


def test_an_unknown_objective_is_refused() -> None:
    """With what there is."""
    with pytest.raises(ValueError, match="balanced, smallest, fastest, accurate"):
        choose((ORIGINAL,), 0, "best")


_CANDIDATES = st.lists(
    st.tuples(st.integers(1_000, 2_000_000), st.floats(0.5, 50), st.floats(0, 0.1), st.booleans()),
    min_size=1,
    max_size=6,
)


@given(_CANDIDATES, st.sampled_from(OBJECTIVES), st.integers(1_000, 2_000_000))
def test_a_limit_that_can_be_held_is_held(
    rows: list[tuple[int, float, float, bool]], objective: str, most: int
) -> None:
    """Whatever else the candidates are like; and a refused one is never taken."""
    candidates = [
        ORIGINAL,
        *(
            figures(f"c{i}", size, time, error, refusal="no" if bad else "")
            for i, (size, time, error, bad) in enumerate(rows)
        ),
    ]
    choice = choose(candidates, 0, objective, Limits(max_size_bytes=most))
    taken = candidates[choice.taken]
    assert not taken.refusal
    assert choice.reasons.count("") == 1
    if any(not one.refusal and one.size_bytes <= most for one in candidates):
        assert taken.size_bytes <= most
        assert not choice.unmet


@given(_CANDIDATES)
def test_balanced_and_smallest_are_what_they_say(rows: list[tuple[int, float, float, bool]]) -> None:
    """No candidate with sound answers is smaller than `smallest` by over 1 %; `balanced` is never larger than the
    original by over 1 % at its speed, and never slower by over 5 %."""
    candidates = [ORIGINAL, *(figures(f"c{i}", size, time, error) for i, (size, time, error, _) in enumerate(rows))]
    smallest = candidates[choose(candidates, 0, "smallest").taken]
    assert smallest.size_bytes <= min(one.size_bytes for one in candidates) * (1 + SAME_SIZE)
    balanced = candidates[choose(candidates, 0, "balanced").taken]
    assert balanced.time_s <= ORIGINAL.time_s * (MAX_SLOWDOWN + 0.02)
    assume(balanced is not ORIGINAL)
    assert balanced.size_bytes * balanced.time_s <= ORIGINAL.size_bytes * ORIGINAL.time_s * 1.03
