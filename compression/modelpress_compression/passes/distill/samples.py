"""The samples of a training run: a part held out for validation, and the rest in batches of a random order."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from modelpress_compression.holding_out import random_share
from modelpress_compression.inputs import Array, Feeds, InputData

# With fewer samples than this, a part held out would say nothing.
LEAST_SAMPLES = 10
Indices = NDArray[np.int64]


@dataclass(frozen=True)
class Feed:
    """The samples of one run of a model: their indices, their inputs, and their labels where there are any."""

    indices: tuple[int, ...]
    inputs: Feeds
    labels: Array | None


@dataclass(frozen=True)
class DataSplit:
    """`train` and `validation`: indices of the samples; the same ones where there are too few to hold some out."""

    data: InputData
    train: Indices
    validation: Indices
    batch_size: int

    @property
    def held_out(self) -> bool:
        return self.train is not self.validation

    @property
    def steps(self) -> int:
        """Batches of an epoch."""
        return -(-len(self._units(self.train)) // self._feeds_a_batch)

    def batches(self, generator: np.random.Generator) -> Iterator[list[Feed]]:
        """The training samples in a new order; a batch is several feeds where a model takes few samples at a time."""
        units = self._units(generator.permutation(self.train))
        for start in range(0, len(units), self._feeds_a_batch):
            yield [self.feed(unit.tolist()) for unit in units[start : start + self._feeds_a_batch]]

    def validation_feeds(self) -> Iterator[Feed]:
        """The samples for validation, always in the same order."""
        return (self.feed(unit.tolist()) for unit in self._units(self.validation))

    def feed(self, indices: Sequence[int]) -> Feed:
        labels = self.data.labels
        return Feed(
            tuple(indices),
            self.data.take(indices),
            None if labels is None else np.asarray(labels[np.asarray(indices, np.int64)]),
        )

    @property
    def _feed_size(self) -> int:
        return 1 if self.data.whole_feeds else self.data.fixed_batch or self.batch_size

    @property
    def _feeds_a_batch(self) -> int:
        return max(1, round(self.batch_size / self._feed_size))

    def _units(self, indices: Indices) -> list[Indices]:
        """Indices feed by feed. Samples that do not fill a fixed batch are left out."""
        size = self._feed_size
        units = [indices[start : start + size] for start in range(0, len(indices), size)]
        return [unit for unit in units if not self.data.fixed_batch or len(unit) == size]


def split(data: InputData, hold_out: float, batch_size: int, seed: int) -> DataSplit:
    """Holds out a random share; nothing where there are fewer than 10 samples or than two feeds."""
    train, validation = random_share(data, hold_out, seed)
    unit = data.feed_size
    if len(data) < LEAST_SAMPLES or min(len(train), len(validation)) < unit:
        everything = np.arange(len(data), dtype=np.int64)
        return DataSplit(data, everything, everything, batch_size)
    return DataSplit(data, train, validation, batch_size)
