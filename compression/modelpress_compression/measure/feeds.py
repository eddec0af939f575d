"""Batches for measuring, made from samples, and the outputs' part that belongs to each sample."""

from __future__ import annotations

import numpy as np

from modelpress_compression.inputs import Array, Feeds, InputData


def true_batch_size(data: InputData, batch_size: int) -> int:
    """How many samples a feed holds when `batch_size` is asked for: the model's own fixed batch; 1 for whole feeds."""
    if data.whole_feeds:
        return 1
    return data.fixed_batch or batch_size


def batches(data: InputData, batch_size: int, count: int) -> list[Feeds]:
    """At most `count` full feeds of `true_batch_size` samples; fewer samples than that are repeated to fill one."""
    size = true_batch_size(data, batch_size)
    made = list(data.feeds(size, limit=size * count))
    if data.whole_feeds:
        return made
    full = [feed for feed in made if all(len(feed[spec.name]) == size for spec in data.specs)]
    return full or [{spec.name: _tile(made[0][spec.name], size) for spec in data.specs}]


def _tile(array: Array, size: int) -> Array:
    return np.ascontiguousarray(np.resize(array, (size, *array.shape[1:])))
