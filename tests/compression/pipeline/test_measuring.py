"""What is said of measured figures."""

from __future__ import annotations

import pytest
from modelpress_compression import Recipe
from modelpress_compression.measure.fidelity import Fidelity, OutputFidelity
from modelpress_compression.measure.latency import LatencyRow, Quantiles, Speedup
from modelpress_compression.pipeline.measuring import Measured, verdict

KEPT = Fidelity("provided", 32, {"y": OutputFidelity(1.0, 40.0, 0.1)}, 1.0, 1.0)


def measured(median: float) -> Measured:
    """A result at this speed-up, within a percent."""
    speedup = Speedup(median, median * 0.99, median * 1.01)
    before, after = Quantiles(1.0, 1.0, 1.0, 1.0), Quantiles(*[1.0 / median] * 4)
    row = LatencyRow("CPUExecutionProvider", 1, 1, 50, (1, 1), 1.0, "wall", before, after, speedup)
    return Measured((row,), KEPT, None, ())


@pytest.mark.parametrize(
    ("median", "first"),
    [(1 / 72, "72.00 times slower, 4.00 times smaller"), (0.8, "4.00 times smaller, 1.25 times slower")],
)
def test_a_far_slower_result_says_so_first(median: float, first: str) -> None:
    """Size comes first, but not where it was bought with many times the original's time."""
    assert verdict(Recipe(), measured(median), 4_000, 1_000).startswith(first)


@pytest.mark.parametrize("size_bytes", [3_990, 4_000, 4_010])
def test_a_few_bytes_are_no_change(size_bytes: int) -> None:
    """Nobody reads "1.00 times larger"."""
    assert verdict(Recipe(), measured(1.25), 4_000, size_bytes).startswith("No smaller, 1.25 times faster")


def test_a_far_slower_result_carries_a_warning() -> None:
    """With the factor, and what to do; a little slower, and faster, need none."""
    (text,) = measured(1 / 72).warnings()
    assert "72 times the original's time" in text
    assert "--goal balanced" in text
    assert measured(0.8).warnings() == []
    assert measured(2.0).warnings() == []
