"""When two outputs count as the same."""

import numpy as np
import pytest
from modelpress_compression.agreement import why_different

ONES = np.ones((2, 100), np.float32)


def with_first(value: float) -> np.ndarray:
    """Ones, but for the first element."""
    changed = ONES.copy()
    changed[0, 0] = value
    return changed


@pytest.mark.parametrize(
    ("expected", "got"),
    [
        (ONES, ONES * np.float32(1.0005)),
        (with_first(np.nan), with_first(np.nan)),
        (with_first(np.inf), with_first(np.inf)),
        (with_first(1e-8), with_first(5e-5)),  # next to ones, that is rounding
        (np.arange(100), np.where(np.arange(100) == 7, 8, np.arange(100))),
        (ONES[:0], ONES[:0]),
    ],
)
def test_rounding_is_no_difference(expected: np.ndarray, got: np.ndarray) -> None:
    """Rounding, equal special values, one flipped index in a hundred and empty outputs agree."""
    assert why_different(expected, got) is None


@pytest.mark.parametrize(
    ("expected", "got", "said"),
    [
        (ONES, ONES * np.float32(1.01), "differs by up to 0.01"),
        (ONES, ONES[:1], "instead of"),
        (ONES, ONES.astype(np.float64), "instead of"),
        (ONES, with_first(np.nan), "not finite"),
        (with_first(np.inf), with_first(-np.inf), "not finite"),
        (ONES * 1e-4, ONES * 2e-4, "differs"),  # small outputs are held to their own scale
        (np.arange(100), np.arange(100) + 1, "0.0%"),
    ],
)
def test_everything_else_is(expected: np.ndarray, got: np.ndarray, said: str) -> None:
    """Values, shapes, types and special values that differ are named."""
    assert said in (why_different(expected, got) or "")
