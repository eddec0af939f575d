"""The teacher: the uploaded model in onnxruntime. Its outputs for unchanged samples are kept."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from modelpress_compression.graph.watch import Taps
from modelpress_compression.inputs import Array, Feeds, values_bytes
from modelpress_compression.passes.distill.samples import Feed

CACHE_BYTES = 256 * 1024**2  # 256 MiB
Outputs = dict[str, Array]


class Teacher:
    """`observe` runs the uploaded model. Its outputs are kept sample by sample until `cache_bytes` are full; those of
    further samples are computed anew each time."""

    def __init__(self, observe: Taps, cache_bytes: int = CACHE_BYTES) -> None:
        self._observe = observe
        self._room = cache_bytes
        self._kept: dict[int, Outputs] = {}

    def __call__(self, feed: Feed) -> Outputs:
        """Outputs for samples as they are in the data."""
        known = [self._kept.get(index) for index in feed.indices]
        found = [outputs for outputs in known if outputs is not None]
        if len(found) == len(known):
            return _joined(found)
        outputs = self._observe(feed.inputs)
        self._keep(feed.indices, outputs)
        return outputs

    def uncached(self, inputs: Feeds) -> Outputs:
        """Outputs for inputs that will not come again."""
        return self._observe(inputs)

    def _keep(self, indices: Sequence[int], outputs: Outputs) -> None:
        """A feed of one sample is kept as it is. Larger ones are kept row by row, where all outputs have rows."""
        count = len(indices)
        if values_bytes(outputs) > self._room:
            return
        if count > 1 and any(array.ndim == 0 or len(array) != count for array in outputs.values()):
            return
        for row, index in enumerate(indices):
            kept = {name: array if count == 1 else array[row : row + 1].copy() for name, array in outputs.items()}
            if self._kept.setdefault(index, kept) is kept:
                self._room -= values_bytes(kept)


def _joined(rows: Sequence[Outputs]) -> Outputs:
    if len(rows) == 1:
        return rows[0]
    return {name: np.concatenate([row[name] for row in rows]) for name in rows[0]}
