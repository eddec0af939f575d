"""What a folded network is made of: units, and the memories between them."""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil, prod

import numpy as np
from numpy.typing import NDArray

from modelpress_compression.backends.fpga.formats import Fixed
from modelpress_compression.backends.fpga.network import Shape


@dataclass(frozen=True)
class Memory:
    """For one sample, with its border: `shape` [channels, height, width], `border` before each of the last two axes
    (`pads` as in `Linear`)."""

    shape: Shape
    pads: Shape
    form: Fixed

    @property
    def padded(self) -> Shape:
        channels, height, width = self.shape
        return channels, height + self.pads[0] + self.pads[2], width + self.pads[1] + self.pads[3]

    @property
    def address_bits(self) -> int:
        return max(1, (prod(self.padded) - 1).bit_length())

    @property
    def start(self) -> int:
        """Address of the first value inside the border."""
        return self.pads[0] * self.padded[2] + self.pads[1]


@dataclass(frozen=True)
class Unit:
    """A layer as hardware. `weights` [outputs, K] and `biases` are whole numbers, in steps of the sum; `biases` with
    half a step of the output. `shift`: bits that are cut off. `ceiling`: the largest result, in steps of the output.
    `offsets` [K]: of the inputs of a window. `window`: offsets of the pooling's places. `rows`, `columns` of its
    outputs, and how far the base moves for each."""

    name: str
    weights: NDArray[np.int64]
    biases: NDArray[np.int64]
    weight_bits: int
    sum_bits: int
    shift: int
    relu: bool
    ceiling: int
    source: Memory
    target: Memory
    offsets: NDArray[np.int64]
    window: NDArray[np.int64]
    rows: int
    columns: int
    row_step: int
    column_step: int
    multipliers: int = 1

    @property
    def outputs(self) -> int:
        return len(self.weights)

    @property
    def groups(self) -> int:
        return ceil(self.outputs / self.multipliers)

    @property
    def cycles(self) -> int:
        """Of one sample, but for the few in which the pipeline fills."""
        return int(self.rows * self.columns * len(self.window) * self.groups * len(self.offsets))

    @property
    def most_multipliers(self) -> int:
        """Results must be written before the next are there."""
        return min(self.outputs, len(self.offsets) * len(self.window))

    @property
    def brams(self) -> int:
        """Of 18 kbit, for weights and the input, as far as they are no lookup tables."""
        weights = self.groups * len(self.offsets) * self.multipliers * self.weight_bits
        values = (2 << self.source.address_bits) * self.source.form.width
        return ceil(weights / 16_384) + ceil(values / 16_384)
