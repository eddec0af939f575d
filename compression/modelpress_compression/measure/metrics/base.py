"""What a metric is: it sees the outputs batch by batch, and then says its figure."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from modelpress_compression.errors import InvalidDataError
from modelpress_compression.inputs import Array, EvaluationData

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]


@dataclass(frozen=True)
class Batch:
    """What a model answers to some samples, and their labels.

    `mask` [N, T]: the positions that count; None: all of them do.
    """

    outputs: Mapping[str, Array]
    labels: Array
    mask: NDArray[np.bool_] | None = None


class Meter(Protocol):
    """A metric of one model while it is measured."""

    def add(self, batch: Batch) -> None:
        """Counts these samples in."""

    def value(self) -> float | None:
        """The figure of all that was added; None: no sample had a usable label."""


@dataclass(frozen=True)
class Task:
    """What a meter is made for. `outputs`: of the first `count` samples of `data`. `metric`: its name."""

    metric: str
    outputs: Mapping[str, Array]
    data: EvaluationData
    count: int

    @property
    def labels(self) -> Array:
        """Of all samples."""
        return self.data.labels

    def first(self, fits: Callable[[Array], bool]) -> str | None:
        """The name of the first output of numbers that fits."""
        return next((name for name, array in self.outputs.items() if array.dtype.kind in "biuf" and fits(array)), None)

    def misfit(self, wanted: str) -> InvalidDataError:
        """Labels and outputs are not what the metric takes. `wanted`: a sentence on what it does take."""
        shapes = ", ".join(f"{name} {list(output.shape)}" for name, output in self.outputs.items())
        return InvalidDataError(
            f"The evaluation data: labels of shape {self.labels.shape} ({self.labels.dtype}) fit no output for "
            f"{self.metric}. Outputs for {self.count} sample(s): {shapes}. {wanted}"
        )


def squeezed(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape without axes of extent 1."""
    return tuple(extent for extent in shape if extent != 1)


def whole_numbers(array: Array) -> Integers | None:
    """The array as integers, where it holds nothing else; what is not finite makes None."""
    if array.dtype.kind in "iub":
        return array.astype(np.int64)
    if array.dtype.kind != "f" or not np.isfinite(array).all() or (np.abs(array) >= 2**53).any():
        return None
    integers = array.astype(np.int64)
    return integers if bool((integers == array).all()) else None
