"""Runs a result on a few samples before it is given back."""

from __future__ import annotations

import math

import numpy as np

from modelpress_compression.errors import ModelNotRunnableError, UnsupportedOperatorError
from modelpress_compression.inputs import Array
from modelpress_compression.model import Model
from modelpress_compression.passes.base import Context
from modelpress_compression.passes.quantize.calibration import spread
from modelpress_compression.runtime import run, session_of

SAMPLES = 4


def why_unusable(original: Model, result: Model, context: Context, least_sqnr_db: float | None = None) -> str | None:
    """Why the result cannot be used: it does not run, is not finite where the original is, or agrees too little.

    `least_sqnr_db`: the floor for each floating-point output over all samples; None: any agreement will do.
    """
    data = spread(context.data, SAMPLES)
    signal: dict[str, float] = {}
    noise: dict[str, float] = {}
    try:
        with session_of(original) as expected_session, session_of(result) as session:
            for feed in data.feeds(batch_size=1):
                context.check_time()
                outputs = run(session, feed)
                for name, expected in run(expected_session, feed).items():
                    got = outputs[name]
                    if expected.dtype.kind != "f" or not _finite(expected) or expected.shape != got.shape:
                        continue
                    if not _finite(got):
                        return f"output {name!r} holds infinite or NaN values where the original's does not"
                    difference = np.subtract(got, expected, dtype=np.float64)
                    signal[name] = signal.get(name, 0.0) + float(np.square(np.asarray(expected, np.float64)).sum())
                    noise[name] = noise.get(name, 0.0) + float(np.square(difference).sum())
    except (ModelNotRunnableError, UnsupportedOperatorError) as error:
        return f"the result does not run: {error.message}"
    if least_sqnr_db is None:
        return None
    for name, power in signal.items():
        sqnr = 10 * math.log10(max(power, 1e-300) / noise[name]) if noise[name] else math.inf
        if sqnr < least_sqnr_db:
            return f"output {name!r} keeps a signal-to-noise ratio of {sqnr:.1f} dB only"
    return None


def _finite(array: Array) -> bool:
    return bool(np.isfinite(array).all())
