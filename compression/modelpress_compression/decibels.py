"""Errors as signal-to-noise ratios, and back.

ratio in dB = 10 log10(signal / noise)        signal, noise: sums of squares; an error is noise / signal
"""

from __future__ import annotations

import math

# "Identical to float precision".
MAX_SQNR_DB = 200.0


def decibels(noise: float, signal: float = 1.0, *, least: float = -MAX_SQNR_DB, most: float = MAX_SQNR_DB) -> float:
    """The ratio in dB, held within `least` and `most`: `most` where there is no noise, else `least` where there is no
    signal or the noise is no finite number. With `noise` alone: of an error, a share of the signal's power."""
    if noise <= 0:
        return most
    if signal <= 0 or not math.isfinite(noise):
        return least
    # A difference of logarithms, since the quotient itself may overflow.
    return min(most, max(least, 10 * (math.log10(signal) - math.log10(noise))))


def power_share(ratio_db: float) -> float:
    """The error at this ratio in dB, a share of the signal's power."""
    return 10 ** (-ratio_db / 10)
