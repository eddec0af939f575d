"""What a block reads and should answer: activations of as many samples as fit into memory, as tensors.

given    values of the quantized model so far, as the block will read them
plain    the same values of the float model, where it has them
wanted   what the float model answers at the block's end
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from modelpress_compression.graph.padding import counted_among
from modelpress_compression.inputs import Array, values_bytes

MAX_BYTES = 256 * 1024**2  # 256 MiB: of one block
MAX_FEED_BYTES = 16 * 1024**2  # 16 MiB: of what runs at once
BATCH, MIN_BATCH = 16, 4  # samples of a step
STEP_BYTES = 4 * 1024**2  # 4 MiB: of what they read and answer
Values = Mapping[str, Array]
Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class Sample:
    """One sample, or one feed of a model with a fixed batch. `counts`: 1 where an answer counts, 0 for padding and what
    is not finite."""

    given: Tensors
    plain: Tensors
    wanted: Tensors
    counts: Tensors
    held_out: bool

    @property
    def size_bytes(self) -> int:
        """Of what it reads and answers."""
        return sum(value.nbytes for values in (self.given, self.plain, self.wanted) for value in values.values())


def gathered(
    rows: Iterable[tuple[Values, Values, Values, NDArray[np.bool_] | None, bool]], device: torch.device
) -> list[Sample]:
    """Samples from (given, plain, wanted, mask, held_out), until the room is full; those whose inputs are not finite
    are left out. Exhausts `rows`."""
    room, found = MAX_BYTES, list[Sample]()
    for given, plain, wanted, mask, held_out in rows:
        size = sum(map(values_bytes, (given, plain, wanted)))
        if (room < size and found) or not _is_finite(given):
            continue
        room -= size
        counts = {name: _counted(array, mask) for name, array in wanted.items()}
        answers = {name: np.where(counts[name], array, 0).astype(array.dtype) for name, array in wanted.items()}
        kept = {name: item.astype(np.float32) for name, item in counts.items()}
        found.append(
            Sample(
                _tensors(given, device),
                _tensors(plain if _is_finite(plain) else {}, device),
                _tensors(answers, device),
                _tensors(kept, device),
                held_out,
            )
        )
    return found


def _tensors(values: Values, device: torch.device) -> Tensors:
    return {name: torch.from_numpy(np.array(array)).to(device) for name, array in values.items()}


def together(samples: Sequence[Sample], batched: bool) -> list[Sample]:
    """As few feeds as may be: as many samples in one as fit into its room, where they can be `batched` along the first
    axis, else as they are. What a block computes for gradients is several times what it reads and answers."""
    if not batched:
        return list(samples)
    count = max(1, MAX_FEED_BYTES // max(samples[0].size_bytes, 1))
    return [_joined_samples(samples[start : start + count]) for start in range(0, len(samples), count)]


def _joined_samples(samples: Sequence[Sample]) -> Sample:
    return Sample(
        _joined([item.given for item in samples]),
        _joined([item.plain for item in samples]),
        _joined([item.wanted for item in samples]),
        _joined([item.counts for item in samples]),
        samples[0].held_out,
    )


def batch_size(samples: Sequence[Sample]) -> int:
    """Samples of a step: fewer of large ones. A picture of 112 x 112 has as many positions to learn from as 16 of
    28 x 28, and steps on the first blocks of a network would take most of the time: what they compute within is several
    times what they read and answer."""
    return min(BATCH, max(MIN_BATCH, STEP_BYTES // max(samples[0].size_bytes, 1)))


def may_be_batched(samples: Sequence[Sample]) -> bool:
    """Whether samples have the same values and shapes, so that they can be tried in one batch."""
    return len(samples) > 1 and len({_signature(item) for item in samples}) == 1


def _signature(item: Sample) -> tuple[object, ...]:
    parts = (item.given, item.plain, item.wanted)
    return tuple((name, tuple(value.shape), value.dtype) for values in parts for name, value in values.items())


def _joined(parts: Sequence[Tensors]) -> Tensors:
    """Along the first axis; what no sample is an axis of (shapes, masks for all) stays as it is."""
    return {
        name: torch.cat([part[name] for part in parts]) if first.dim() and first.shape[0] == 1 else first
        for name, first in parts[0].items()
    }


def _is_finite(values: Values) -> bool:
    return all(bool(np.isfinite(array).all()) for array in values.values() if array.dtype.kind == "f")


def _counted(array: Array, mask: NDArray[np.bool_] | None) -> NDArray[np.bool_]:
    counts: NDArray[np.bool_] = np.isfinite(array)
    positions = counted_among(array.shape[:-1], mask)
    if positions is not None:
        counts = counts & positions.reshape(*positions.shape, *(1,) * (array.ndim - positions.ndim))
    return counts
