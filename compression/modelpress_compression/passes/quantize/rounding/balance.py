"""Rounding weights so that the errors of each sum cancel out.

An output is wrong by sum_k e_k x_k. What the errors e_k sum up to is multiplied by the mean of the activations, which
behind a Relu is as large as their spread: a constant offset, and the greater part of the noise of many convolutional
networks. Rounding those few weights the other way that lie nearest to the middle between two levels takes it away and
hardly adds to the squared error. It needs no data. With plain percentile ranges it gains 6.6 dB for PP-OCR
recognition, 4.2 dB for EfficientNet-Lite0, 2.8 dB for a small ResNet, and nothing for MiniLM, whose activations have no
mean.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from modelpress_compression.encodings.weight import QuantizedWeight
from modelpress_compression.passes.integers.products import Summation
from modelpress_compression.passes.integers.saturation import LARGEST_LEVEL
from modelpress_compression.passes.quantize.rounding.affine import LARGEST_4_BIT_LEVEL


def balanced(quantized: QuantizedWeight, weight: NDArray[np.float32], summation: Summation) -> QuantizedWeight:
    """The weight with the sum of its rounding errors within half a level for each output."""
    values = quantized.levels.copy()
    largest = LARGEST_4_BIT_LEVEL if quantized.bits == 4 else LARGEST_LEVEL
    middle = np.float32(quantized.zero_point)
    scale = np.broadcast_to(quantized.scale, summation.slices(values.shape))
    terms = 2 * summation.pair_count(values.shape)
    for part, index in summation.chunks(values.shape):
        levels = summation.pairs(values[index].astype(np.float32) - middle)
        error = np.asarray(levels - summation.pairs(weight[index]) / scale[part][:, None, None], np.float32)
        turned = _turned(error.reshape(-1, terms)).reshape(levels.shape)
        levels = np.clip(levels - turned, -largest, largest)
        values[index] = summation.restore(levels + middle, values[index].shape)
    return replace(quantized, levels=values)


def _turned(error: NDArray[np.float32]) -> NDArray[np.float32]:
    """[sums, terms] -> +1 where a level goes down, -1 where it goes up, 0 for the rest."""
    # A turned level moves its sum by one: as many are turned as the sum is off, those whose error is largest already in
    # its direction, so that they end up about as far on the other side.
    surplus = np.rint(error.sum(axis=1, keepdims=True))
    sign = np.sign(surplus)
    order = np.argsort(-sign * error, axis=1)
    turned = np.zeros_like(error)
    np.put_along_axis(turned, order, np.where(np.arange(error.shape[1]) < np.abs(surplus), sign, 0), axis=1)
    return turned
