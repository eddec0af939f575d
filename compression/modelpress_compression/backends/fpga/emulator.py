"""The fixed-point network on the CPU, bit for bit what the hardware computes.

All numbers are multiples of a power of two below 2**53 steps, so that float64 arithmetic on them is exact in whatever
order sums are taken; `check_exact` makes sure of it. Without a design the same code runs the float network, and with
gradients it is what training sees.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import ceil, inf, log2, prod
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

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
_FLOAT32_BITS = 22  # of any number on its way: rounding needs one besides, and the sign is another
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
    dtype = torch.float32 if design is not None and _is_short(network, design) else torch.float64
    weights = {layer.name: _weights(network, layer, operation, design) for layer, operation in network.linear()}
    constants = {name: (weight.to(dtype), bias.to(dtype)) for name, (weight, bias) in weights.items()}
    parts = []
    for start in range(0, len(samples), chunk):
        given = np.asarray(samples[start : start + chunk], np.float64).reshape(-1, *network.input_shape)
        if watch is not None:
            watch(network.input, given)
        if design is not None:
            given = design.values[network.input].round_input(given)
        with torch.inference_mode():
            made = forward(network, torch.from_numpy(given).to(dtype), constants, design, watch)
        parts.append(made.to(torch.float64).numpy())
    return np.concatenate(parts)


def _weights(network: Network, layer: Layer, operation: Linear, design: Design | None) -> tuple[Tensor, Tensor]:
    weight, bias = operation.weight, operation.bias
    if design is not None:
        weight = design.rounded_weight(layer, operation)
        bias = design.rounded_bias(layer, operation, fraction_of_values(network, design)[layer.inputs[0]])
    return torch.tensor(weight), torch.tensor(bias)


def _is_short(network: Network, design: Design) -> bool:
    """Whether float32, which is faster, holds all numbers on their way as well."""
    if any(isinstance(layer.operation, Pool) and layer.operation.mean for layer in network.layers):
        return False  # the factor of a mean has many bits
    forms = design.values.values()
    widest = max(form.integer for form in forms) + max(form.fraction for form in forms) + 1  # of a sum of two values
    return max(widest, *sum_bits(network, design).values()) <= _FLOAT32_BITS


def forward(
    network: Network,
    given: Tensor,
    constants: Mapping[str, tuple[Tensor, Tensor]],
    design: Design | None,
    watch: Callable[[str, Reals], None] | None = None,
) -> Tensor:
    """The output for `given` [samples, *shape], which has its format. `constants`: weight and bias of each layer that
    has them, as they are computed with. Gradients pass what is rounded as if it were not."""
    values = {network.input: given}
    fractions = fraction_of_values(network, design) if design is not None else {}
    for layer in network.layers:
        sources = [values[name] for name in layer.inputs]
        result = _compute(layer, sources, constants.get(layer.name), design, fractions.get(layer.inputs[0], 0))
        if layer.relu:
            result = result.clamp(0.0, layer.ceiling)
        if layer.rounds:
            if watch is not None:
                watch(layer.output, result.numpy())
            if design is not None:
                result = rounded(result, design.values[layer.output])
        values[layer.output] = result
    return values[network.output]


def rounded(values: Tensor, form: Fixed) -> Tensor:
    """As `Fixed.round`. The gradient is 1, and 0 where numbers saturate (straight-through, arXiv 1308.3432)."""
    made: Tensor = _Rounded.apply(values, form)  # type: ignore[no-untyped-call]  # torch has no annotations there
    return made


class _Rounded(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, form: Fixed) -> Tensor:
        ctx.save_for_backward((values >= form.low - form.step / 2) & (values < form.high + form.step / 2))
        return torch.floor(values * 2.0**form.fraction + 0.5).mul(form.step).clamp(form.low, form.high)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (inside,) = ctx.saved_tensors
        return gradients[0] * inside, None


def _compute(
    layer: Layer, sources: list[Tensor], constants: tuple[Tensor, Tensor] | None, design: Design | None, fraction: int
) -> Tensor:
    """What the layer makes of its inputs, before its Relu and its rounding. `fraction`: of the first input."""
    operation, (first, *others) = layer.operation, sources
    if isinstance(operation, Linear) and constants is not None:
        return _linear(first, operation, *constants)
    if isinstance(operation, Pool):
        return _pool(first, operation, exact=design is not None)
    if isinstance(operation, Add):
        return first + others[0]
    if isinstance(operation, Relu):
        return first.clamp(0.0, operation.ceiling if design is None else operation.ceiling_at(fraction))
    if isinstance(operation, Transpose):
        return first.permute(0, *(axis + 1 for axis in operation.axes))
    return first.reshape(len(first), *layer.shape)


def _linear(x: Tensor, operation: Linear, weight: Tensor, bias: Tensor) -> Tensor:
    if not operation.kernel:
        return functional.linear(x, weight, bias)
    convolve = (functional.conv1d, functional.conv2d, functional.conv3d)[len(operation.kernel) - 1]
    padded = _padded(x, operation.pads, 0.0)
    return convolve(padded, weight, bias, operation.strides, 0, operation.dilations, operation.group)


def _padded(x: Tensor, pads: Shape, fill: float) -> Tensor:
    """`pads`: begins of all axes, then ends."""
    axes = len(pads) // 2
    ends = [end for axis in reversed(range(axes)) for end in (pads[axis], pads[axes + axis])]
    return functional.pad(x, ends, value=fill) if any(pads) else x


def _pool(x: Tensor, operation: Pool, *, exact: bool) -> Tensor:
    if not operation.mean:
        return functional.max_pool2d(_padded(x, operation.pads, -inf), operation.kernel, operation.strides)
    total = functional.avg_pool2d(x, operation.kernel, operation.strides, divisor_override=1)
    return total * (mean_factor(operation) if exact else 1.0 / prod(operation.kernel))


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
