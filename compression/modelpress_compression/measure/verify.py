"""Whether two models give the same answers up to rounding: the proof that follows every lossless pass.

A float output passes where |a - b| <= atol + rtol * max|a|, the maximum taken over that output of that sample. It is
the output's scale and not the element's, since reordering a sum errs in proportion to its terms, whatever they add up
to. Integer, bool and string outputs must be equal; NaN and infinities must stand in the same places.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnxruntime as ort

from modelpress_compression.inputs import Array, InputData
from modelpress_compression.model import Model
from modelpress_compression.runtime import open_session, run, session_of

DEFAULT_LIMIT = 8


@dataclass(frozen=True)
class _Tolerances:
    rtol: float
    atol: float


@dataclass(frozen=True)
class Mismatch:
    """The worst difference beyond tolerance. `error` is the largest absolute one, `allowed` what was permitted there;
    both None where sizes, types or finiteness differ. `sample` counts feeds from 0."""

    output: str
    sample: int
    error: float | None
    allowed: float | None
    reason: str

    def __str__(self) -> str:
        return f"output {self.output!r}, sample {self.sample}: {self.reason}"


def outputs_match(
    before: Model | Path,
    after: Model | Path,
    data: InputData,
    rtol: float,
    atol: float,
    *,
    threads: int = 2,
    limit: int = DEFAULT_LIMIT,
) -> Mismatch | None:
    """None where all outputs agree on at most `limit` samples, else the worst difference.

    Raises ModelNotRunnableError or UnsupportedOperatorError where one of the models does not run.
    """
    worst: Mismatch | None = None
    with _session(before, threads) as first, _session(after, threads) as second:
        for sample, feed in enumerate(data.feeds(1, limit)):
            expected, got = run(first, feed), run(second, feed)
            for name, reference in expected.items():
                found = _compare(name, sample, reference, got.get(name), _Tolerances(rtol, atol))
                if found is not None and (worst is None or _excess(found) > _excess(worst)):
                    worst = found
    return worst


@contextmanager
def _session(model: Model | Path, threads: int) -> Iterator[ort.InferenceSession]:
    if isinstance(model, Path):
        yield open_session(model, threads=threads)
        return
    with session_of(model, threads=threads) as session:
        yield session


def _compare(name: str, sample: int, reference: Array, got: Array | None, tolerances: _Tolerances) -> Mismatch | None:
    if reason := _differs(reference, got):
        return Mismatch(name, sample, None, None, reason)
    if got is None or reference.dtype.kind not in "fV":
        return None
    finite = np.isfinite(reference.astype(np.float64))
    if not finite.any():
        return None
    first, second = reference.astype(np.float64)[finite], got.astype(np.float64)[finite]
    error = float(np.abs(first - second).max())
    allowed = tolerances.atol + tolerances.rtol * float(np.abs(first).max())
    if error <= allowed:
        return None
    return Mismatch(name, sample, error, allowed, f"differs by {error:.3g}, {allowed:.3g} is allowed")


def _differs(reference: Array, got: Array | None) -> str:
    """What tolerances do not apply to; empty where all of it is the same."""
    if got is None:
        return "the output is missing"
    if reference.shape != got.shape:
        return f"shape {got.shape} instead of {reference.shape}"
    if reference.dtype != got.dtype:
        return f"type {got.dtype} instead of {reference.dtype}"
    if reference.dtype.kind not in "fV":
        unequal = int(np.count_nonzero(reference != got))
        return f"{unequal} of {reference.size} elements differ" if unequal else ""
    first, second = reference.astype(np.float64), got.astype(np.float64)
    finite = np.isfinite(first)
    if np.array_equal(first[~finite], second[~finite], equal_nan=True) and np.isfinite(second[finite]).all():
        return ""
    return "NaN or infinite values stand in other places"


def _excess(mismatch: Mismatch) -> float:
    """How bad it is: error over what is allowed."""
    if mismatch.error is None or mismatch.allowed is None or mismatch.allowed == 0.0:
        return float("inf")
    return mismatch.error / mismatch.allowed
