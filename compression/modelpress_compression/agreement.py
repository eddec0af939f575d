"""Whether two outputs are the same up to rounding: the proof behind every conversion and every lossless rewrite.

A float output agrees where |a - b| <= 1e-3 |a| + 1e-4 max|a|, the maximum taken over the output: the error of a
reordered sum is in proportion to its terms, whatever they add up to. NaN and infinities must stand in the same places.
Outputs of other types must be equal in 99 % of their elements, since an ArgMax may flip where two scores tie.
"""

from __future__ import annotations

import numpy as np

from modelpress_compression.inputs import Array

RTOL = 1e-3
ATOL = 1e-4  # of the output's largest magnitude
# Of models of 8 bits: a sum that is rounded the other way is one step of 255 away, and that goes on through the layers.
QUANTIZED_ATOL = 0.03
# float16 itself rounds to 1e-3; so do the insides of a model whose weights are float16.
FLOAT16_RTOL = 1e-2
FLOAT16_ATOL = 1e-3
# Smaller numbers are rounding noise of terms that cancelled.
NOISE = 1e-6
LEAST_EQUAL_SHARE = 0.99


def why_different(expected: Array, got: Array, *, atol: float = ATOL) -> str | None:
    """How they differ, to follow the output's name: "differs by up to ...". None where they agree.

    `atol`: of the output's largest magnitude.
    """
    if expected.shape != got.shape or expected.dtype != got.dtype:
        return f"is {got.dtype} {got.shape} instead of {expected.dtype} {expected.shape}"
    if expected.size == 0:
        return None
    if expected.dtype.kind not in "fc":
        share = float(np.mean(expected == got))
        return None if share >= LEAST_EQUAL_SHARE else f"agrees in {share:.1%} of its elements only"
    wide = np.complex128 if expected.dtype.kind == "c" else np.float64
    a, b = expected.astype(wide), got.astype(wide)
    finite = np.isfinite(a)
    if not np.array_equal(a[~finite], b[~finite], equal_nan=True) or not np.isfinite(b[finite]).all():
        return "differs where it is not finite"
    scale = float(np.abs(a[finite]).max(initial=0.0))
    error = np.abs(a[finite] - b[finite])
    half = expected.dtype == np.float16
    rtol, atol = (FLOAT16_RTOL, max(atol, FLOAT16_ATOL)) if half else (RTOL, atol)
    if (error <= rtol * np.abs(a[finite]) + atol * scale + NOISE).all():
        return None
    return f"differs by up to {float(error.max()):.3g}, where its values go up to {scale:.3g}"
