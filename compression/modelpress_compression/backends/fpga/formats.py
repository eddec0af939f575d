"""Fixed-point formats: how many bits a number has, and where its point is.

A number of the format is k * 2**-fraction, for integers k of `width` bits. Others are rounded to the nearest and
saturate at the ends. Inside a network halves are rounded up: the hardware adds half a step, mostly as part of a bias,
and cuts the rest off. Its inputs are rounded by the host, halves to even. All numbers are exact in float64.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Reals = NDArray[np.float64]
MOST_BITS = 52  # of any number on its way: float64 holds them all


@dataclass(frozen=True)
class Fixed:
    """`integer` bits before the point, `fraction` bits behind it, one of which may be negative; a sign bit if
    `signed`."""

    signed: bool
    integer: int
    fraction: int

    def __post_init__(self) -> None:
        if self.width < 1 + self.signed:
            raise ValueError(f"a number needs a bit beside its sign; {self.integer} and {self.fraction} make none")

    @property
    def width(self) -> int:
        """In bits, with the sign."""
        return self.integer + self.fraction + self.signed

    @property
    def step(self) -> float:
        """Between neighbours."""
        return 2.0**-self.fraction

    @property
    def low(self) -> float:
        """The smallest number."""
        return -(2.0**self.integer) if self.signed else 0.0

    @property
    def high(self) -> float:
        """The largest number."""
        return 2.0**self.integer - self.step

    def round(self, values: Reals) -> Reals:
        """The nearest numbers of the format, halves up."""
        return np.clip(np.floor(values * 2.0**self.fraction + 0.5) * self.step, self.low, self.high)

    def round_input(self, values: Reals) -> Reals:
        """The nearest numbers of the format, halves to even."""
        return np.clip(np.rint(values * 2.0**self.fraction) * self.step, self.low, self.high)

    def integers(self, values: Reals) -> NDArray[np.int64]:
        """The k of numbers that have the format."""
        return np.rint(values * 2.0**self.fraction).astype(np.int64)

    def __str__(self) -> str:
        """As in `s3.5`: signed, three bits before the point and five behind it."""
        return f"{'s' if self.signed else 'u'}{self.integer}.{self.fraction}"


@dataclass(frozen=True)
class Port:
    """`count` numbers side by side, the first in the lowest bits, each as `form` says."""

    name: str
    count: int
    form: Fixed

    @property
    def width(self) -> int:
        return self.count * self.form.width

    def bits(self, values: Reals) -> NDArray[np.bool_]:
        """[..., count] numbers as [..., width] bits."""
        integers = self.form.integers(values)[..., None] >> np.arange(self.form.width)
        return (integers & 1).astype(np.bool_).reshape(*values.shape[:-1], self.width)

    def values(self, bits: NDArray[np.bool_]) -> Reals:
        """The inverse of `bits`."""
        weights = 2.0 ** (np.arange(self.form.width) - self.form.fraction)
        if self.form.signed:
            weights[-1] *= -1
        return bits.reshape(*bits.shape[:-1], self.count, self.form.width) @ weights


def integer_bits(largest: float) -> int:
    """Before the point, for magnitudes up to `largest`."""
    return math.frexp(largest)[1] if largest > 0 else 0


def fraction_bits(values: Reals) -> int:
    """Behind the point, that these numbers need to be exact; they have at most `MOST_BITS`."""
    scaled, shift = np.asarray(values, np.float64), 0
    whole = np.abs(scaled).max(initial=0.0)
    if whole == 0:
        return 0
    shift = MOST_BITS - integer_bits(float(whole))
    integers = np.rint(scaled * 2.0**shift).astype(np.int64)
    lowest = int(np.bitwise_or.reduce(np.abs(integers), axis=None))
    return shift - ((lowest & -lowest).bit_length() - 1)
