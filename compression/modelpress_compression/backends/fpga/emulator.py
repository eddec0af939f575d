"""The fixed-point network on the CPU, bit for bit what the hardware computes.

All numbers are multiples of a power of two below 2**53 steps, so that float64 arithmetic on them is exact in whatever
order sums are taken; `check_exact` makes sure of it. Without a design the same code runs the float network.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import ceil, log2, prod

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

from modelpress_compression.backends.fpga.formats import MOST_BITS, Fixed, Reals, integer_bits
from modelpress_compression.backends.fpga.network import (
    Add,
    Layer,
    Linear,
    Network,
    Pool,
    Relu,
    Shape,
    Transpose,
)
from modelpress_compression.errors import UnsupportedOperatorError

_CHUNK, _CHUNK_VALUES = 64, 2**26  # samples at a time, and values of all layers that they may have
MEAN_BITS = 10  # of the factor that stands for a division by a number that is no power of two


@dataclass(frozen=True)
class Design:
    """Formats: of `values` by name (the input, and the output of each layer that rounds), and of `weights` by layer.
    Sums are exact, and so are biases up to half a step of the sum."""

    values: Mapping[str, Fixed]
    weights: Mapping[str, Fixed]

    def rounded_weight(self, layer: Layer, operation: Linear) -> Reals:
        return self.weights[layer.name].round(operation.weight)

    def sum_fraction(self, layer: Layer, fraction: int) -> int:
        """Bits behind the point of a layer's sums, whose input has `fraction`."""
        return fraction + self.weights[layer.name].fraction

    def ceiling(self, layer: Layer) -> float:
        """The largest number that a layer with a format gives."""
        form = self.values[layer.output]
        return min(form.high, float(form.round(np.array(layer.ceiling))))

    def rounded_bias(self, layer: Layer, operation: Linear, fraction: int) -> Reals:
        """On the steps of the sums."""
        steps = 2.0 ** self.sum_fraction(layer, fraction)
        rounded: Reals = np.floor(operation.bias * steps + 0.5) / steps
        return rounded


def run(
    network: Network, samples: Reals, design: Design | None = None, watch: Callable[[str, Reals], None] | None = None
) -> Reals:
    """Outputs [samples, *shape]; None: of the float network. `watch` sees each value that has, or may get, a format."""
    size = sum(prod(layer.shape) for layer in network.layers)
    chunk = max(min(_CHUNK, _CHUNK_VALUES // size), 1)
    parts = []
    for start in range(0, len(samples), chunk):
        parts.append(_run(network, np.asarray(samples[start : start + chunk], np.float64), design, watch))
    return np.concatenate(parts)


def _run(network: Network, samples: Reals, design: Design | None, watch: Callable[[str, Reals], None] | None) -> Reals:
    values: dict[str, Reals] = {}
    fractions = fraction_of_values(network, design) if design is not None else {}

    def rounded(name: str, array: Reals) -> Reals:
        if watch is not None:
            watch(name, array)
        return array if design is None else design.values[name].round(array)

    given = samples.reshape(len(samples), *network.input_shape)
    if watch is not None:
        watch(network.input, given)
    values[network.input] = given if design is None else design.values[network.input].round_input(given)
    for layer in network.layers:
        sources = [values[name] for name in layer.inputs]
        result = compute(layer, sources, design, fractions.get(layer.inputs[0], 0))
        if layer.relu:
            result = np.clip(result, 0.0, layer.ceiling)
        values[layer.output] = rounded(layer.output, result) if layer.rounds else result
    return values[network.output]


def compute(layer: Layer, sources: list[Reals], design: Design | None, fraction: int) -> Reals:
    """What the layer makes of its inputs, before its Relu and its rounding. `fraction`: of the first input."""
    operation, (first, *others) = layer.operation, sources
    if isinstance(operation, Linear):
        weight, bias = operation.weight, operation.bias
        if design is not None:
            weight = design.rounded_weight(layer, operation)
            bias = design.rounded_bias(layer, operation, fraction)
        return _linear(first, operation, weight, bias)
    if isinstance(operation, Pool):
        return _pool(first, operation, exact=design is not None)
    if isinstance(operation, Add):
        return first + others[0]
    if isinstance(operation, Relu):
        high = operation.ceiling if design is None else operation.ceiling_at(fraction)
        return np.clip(first, 0.0, high)
    if isinstance(operation, Transpose):
        return first.transpose(0, *(axis + 1 for axis in operation.axes))
    return first.reshape(len(first), *layer.shape)


def _linear(x: Reals, operation: Linear, weight: Reals, bias: Reals) -> Reals:
    if not operation.kernel:
        dense: Reals = x @ weight.T + bias
        return dense
    import torch
    from torch.nn import functional

    axes = len(operation.kernel)
    convolve = (functional.conv1d, functional.conv2d, functional.conv3d)[axes - 1]
    wide = [(0, 0), (0, 0), *((operation.pads[axis], operation.pads[axes + axis]) for axis in range(axes))]
    with torch.inference_mode():
        given, weights, biases = (
            torch.from_numpy(np.ascontiguousarray(array)) for array in (np.pad(x, wide), weight, bias)
        )
        made = convolve(given, weights, biases, operation.strides, 0, operation.dilations, operation.group)
    convolved: Reals = made.numpy()
    return convolved


def _windows(x: Reals, kernel: Shape, strides: Shape, pads: Shape, dilations: Shape, fill: float = 0.0) -> Reals:
    """[samples, channels, *positions, *kernel]"""
    axes = len(kernel)
    wide = [(0, 0), (0, 0), *((pads[axis], pads[axes + axis]) for axis in range(axes))]
    padded = np.pad(x, wide, constant_values=fill) if any(pads) else x
    spans = tuple(dilations[axis] * (kernel[axis] - 1) + 1 for axis in range(axes))
    windows = sliding_window_view(padded, spans, axis=tuple(range(2, 2 + axes)))
    steps = (*(slice(None, None, each) for each in strides), *(slice(None, None, each) for each in dilations))
    return windows[(slice(None), slice(None), *steps)]


def _pool(x: Reals, operation: Pool, *, exact: bool) -> Reals:
    fill = 0.0 if operation.mean else -np.inf
    windows = _windows(x, operation.kernel, operation.strides, operation.pads, (1, 1), fill)
    factor = mean_factor(operation) if exact else 1.0 / prod(operation.kernel)
    pooled: Reals = windows.sum(axis=(-2, -1)) * factor if operation.mean else windows.max(axis=(-2, -1))
    return pooled


def mean_factor(operation: Pool) -> float:
    """What the hardware multiplies a sum with for its mean: exact for powers of two, else of `MEAN_BITS` bits."""
    count = prod(operation.kernel)
    bits = MEAN_BITS + ceil(log2(count))
    return round(2.0**bits / count) / 2.0**bits


def mean_fraction(operation: Pool) -> int:
    """Bits behind the point of that factor."""
    count = prod(operation.kernel)
    shift = int(log2(count))
    return shift if 2**shift == count else MEAN_BITS + ceil(log2(count))


def fraction_of_values(network: Network, design: Design) -> dict[str, int]:
    """Bits behind the point of each value."""
    found = {network.input: design.values[network.input].fraction}
    for layer in network.layers:
        own = design.values.get(layer.output)
        found[layer.output] = own.fraction if own is not None else max(found[name] for name in layer.inputs)
    return found


def sum_bits(network: Network, design: Design) -> dict[str, int]:
    """Of the sums of each layer with weights, by its name: width with the sign, for whatever inputs there can be."""
    fractions, highest = fraction_of_values(network, design), {network.input: _largest(design.values[network.input])}
    found = {}
    for layer in network.layers:
        own = design.values.get(layer.output)
        highest[layer.output] = _largest(own) if own is not None else max(highest[name] for name in layer.inputs)
        operation = layer.operation
        if isinstance(operation, Linear):
            fraction = fractions[layer.inputs[0]]
            weight = np.abs(design.rounded_weight(layer, operation)).reshape(len(operation.weight), -1)
            bound = weight.sum(axis=1) * highest[layer.inputs[0]] + np.abs(operation.bias)
            bits = integer_bits(float(bound.max())) + design.sum_fraction(layer, fraction) + 1
            found[layer.name] = max(bits, 1)
    return found


def check_exact(network: Network, design: Design) -> None:
    """Raises UnsupportedOperatorError where sums could have more bits than float64 keeps apart."""
    for name, bits in sum_bits(network, design).items():
        if bits > MOST_BITS:
            raise UnsupportedOperatorError(
                f"The network has no form in fixed point: sums of {name} would have {bits} bits, and {MOST_BITS} are "
                "the most. Weights, biases or samples lie far out of the others' range.",
                op_type="",
            )


def _largest(form: Fixed) -> float:
    return max(-form.low, form.high)
