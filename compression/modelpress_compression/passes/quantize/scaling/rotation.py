"""Rotations of residual streams: outliers of single channels are spread over all of them (streams.py has the algebra).

    Q = Q0 (I - 2 v v^T / v^T v),   Q0 = diag(s) (H x C),   v = (Q0^T 1 - 1) / sqrt(K)

s: random signs; H: Hadamard matrix of the largest power of two in K, scaled to be orthogonal; C: orthonormal cosine
transform (DCT-II) of what is left of K; x: their Kronecker product. A channel has a share of about 1 / sqrt(K) in each
new one. The reflection makes 1^T Q = 1^T, which LayerNormalization asks for, and changes entries by about 1 / K.

Nothing is added to the graph: a rotated model is as large and as fast as it was.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from modelpress_compression.graph.edit import Editor, clean
from modelpress_compression.mapped import WeightFile
from modelpress_compression.model import Model
from modelpress_compression.passes.quantize.scaling.streams import Stream

_ROWS = 4096  # that are turned at a time

Numbers = NDArray[np.float64]


class Rotation:
    """Q [K, K] for streams of K channels; the same for the same seed."""

    def __init__(self, channels: int, seed: int = 0) -> None:
        self._channels = channels
        self._power = channels & -channels  # the largest power of two that divides K
        self._signs = np.random.default_rng([seed, channels]).choice((-1.0, 1.0), channels)
        size = channels // self._power
        angles = np.pi / size * np.outer(np.arange(size) + 0.5, np.arange(size))
        self._cosines = np.cos(angles) * np.sqrt(np.where(np.arange(size) == 0, 1, 2) / size)

    def of(self, rows: NDArray[Any], factor: NDArray[Any] | None = None) -> NDArray[Any]:
        """(rows * factor) Q for rows [R, K], in their type."""
        turned = np.empty(rows.shape, rows.dtype)
        for start in range(0, len(rows), _ROWS):
            some = np.asarray(rows[start : start + _ROWS], np.float64)
            spread = self._spread(some if factor is None else some * factor)
            turned[start : start + _ROWS] = spread - np.outer(spread @ self._mirror, 2 * self._mirror)
        return turned

    @cached_property
    def _mirror(self) -> Numbers:
        """v, of length 1, or 0 where Q0 keeps the mean by itself."""
        ones = np.ones((1, self._channels))
        mirror = (self._spread(ones) - ones)[0]
        length = float(np.linalg.norm(mirror))
        return mirror / length if length > 1e-6 else np.zeros_like(mirror)

    def _spread(self, rows: Numbers) -> Numbers:
        """rows Q0, by the fast Hadamard transform."""
        values = (rows * self._signs).reshape(len(rows), self._power, -1) @ self._cosines
        half = 1
        while half < self._power:
            pairs = values.reshape(len(rows), -1, 2, half, values.shape[-1])
            values = np.stack((pairs[:, :, 0] + pairs[:, :, 1], pairs[:, :, 0] - pairs[:, :, 1]), axis=2)
            half *= 2
        return np.asarray(values.reshape(rows.shape) / np.sqrt(self._power), np.float64)


def rotate(model: Model, streams: Sequence[Stream], seed: int = 0, weights: WeightFile | None = None) -> None:
    """Turns the model's streams in place, by the weights around them. The answers stay, up to rounding in float32.

    `weights`: the file that turned weights go to; None: to memory.
    """
    editor = Editor(model, weights)
    for stream in streams:
        rotation = Rotation(stream.channels, seed)
        for fold in stream.folds:
            array = np.moveaxis(fold.slot.array, fold.slot.axis, -1)
            turned = rotation.of(array.reshape(-1, stream.channels), fold.factor).reshape(array.shape)
            fold.slot.put(np.moveaxis(turned, -1, fold.slot.axis), editor, "rotated")
        for slot in stream.gains:
            slot.put(np.ones(slot.array.shape), editor, "taken_in")
    clean(model)
