"""Whether inputs have the scale that a model was made for, told by the numbers that its first layers were trained to.

    BatchNormalization behind the input, or behind the layer that reads it:
        deviation of what it reads / sqrt(its running variance)                  about 1 on the data of training
    Conv, Gemm, or MatMul and Add, with a bias:
        deviation of the sums / root mean square of the bias                     1 to 6 on trained networks

The second is no proof by itself, for a bias may be close to zero: there the layer's input must be large too. On four
trained networks (two small classifiers, an EfficientNet, a text recognizer) the first measure was 0.85 and the second
0.5 to 5.6; with pixels of 0 to 255 in place of normalized ones both were 54 to 361. Networks that normalize whatever
they get, and first layers without either, say nothing, and neither does this.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import onnx_ir
from numpy.typing import NDArray

from modelpress_compression.encodings.products import added_bias
from modelpress_compression.graph.linear import parts_along
from modelpress_compression.graph.read import constant_array, float_attribute, input_of, is_constant, label
from modelpress_compression.graph.watch import observable, stream
from modelpress_compression.inputs import Array, InputData
from modelpress_compression.model import Model

SAMPLES = 8
TOO_LARGE, TOO_SMALL = 30.0, 0.01
# Where the bias alone speaks, the layer's input must be this large: a normalized one is about 1, pixels about 100.
LARGE_INPUT = 20.0
_MOVES = ("Cast", "Identity", "Pad", "Reshape", "Transpose", "Squeeze", "Unsqueeze", "Flatten", "Slice")
_MAX_HOPS = 16
_ARITHMETIC = ("Add", "Sub", "Mul", "Div")


def scale_warnings(model: Model, data: InputData) -> list[str]:
    """What to say of each input whose scale the model's first layers speak against. Raises ModelNotRunnableError."""
    found = []
    for value in model.graph.inputs:
        gauges = [gauge for gauge in _gauges(value) if observable(gauge.sums, model) and observable(gauge.read, model)]
        for gauge, factor in zip(gauges, _factors(model, gauges, data), strict=True):
            if factor > TOO_LARGE or (gauge.from_training and factor < TOO_SMALL):
                found.append(_warning(value.name or "", gauge, factor))
                break
    return found


def _warning(name: str, gauge: _Gauge, factor: float) -> str:
    seen = (
        f"varies {factor:.3g} times as much as in training"
        if gauge.from_training
        else f"gives sums {factor:.3g} times as large as the bias that it adds to them, where 1 to 6 are usual"
    )
    size = "large" if factor > 1 else "small"
    return (
        f"the values of input {name!r} look far too {size} for this model: layer {label(gauge.node)!r} {seen}. Check "
        f"that they were scaled as in training (pixels of 0 to 255 where 0 to 1 are meant, mean and deviation): what "
        f"is measured on them says little about real inputs."
    )


@dataclass(frozen=True)
class _Gauge:
    """A layer that tells the scale: `read`, its input; `sums`, what has the deviation `usual` along `axis`.

    `from_training`: `usual` is a statistic of the training data, not the size of a bias.
    """

    node: onnx_ir.Node
    read: onnx_ir.Value
    sums: onnx_ir.Value
    axis: int
    usual: NDArray[np.float64]
    from_training: bool


def _gauges(start: onnx_ir.Value) -> Iterator[_Gauge]:
    """Of an input, behind at most `_MAX_HOPS` operators that move its numbers or compute with constants."""
    values = [start]
    for value in values:
        for node, index in value.uses():
            if index == 0 and node.op_type == "BatchNormalization":
                yield from _normalization(node, value, value)
            elif index == 0 and node.op_type in ("Conv", "Gemm", "MatMul"):
                for user, place in node.outputs[0].uses():
                    if place == 0 and user.op_type == "BatchNormalization":
                        yield from _normalization(user, value, node.outputs[0])
                yield from _biased(node, value)
            elif _passes_on(node, index) and len(values) < _MAX_HOPS:
                values.append(node.outputs[0])


def _passes_on(node: onnx_ir.Node, index: int) -> bool:
    if node.op_type in _ARITHMETIC:
        return is_constant(input_of(node, 1 - index))
    return index == 0 and node.op_type in _MOVES


def _normalization(node: onnx_ir.Node, read: onnx_ir.Value, sums: onnx_ir.Value) -> Iterator[_Gauge]:
    variance = constant_array(input_of(node, 4))
    if variance is not None:
        epsilon = float_attribute(node, "epsilon", 1e-5)
        yield _Gauge(node, read, sums, 1, np.sqrt(variance.astype(np.float64) + epsilon), from_training=True)


def _biased(node: onnx_ir.Node, read: onnx_ir.Value) -> Iterator[_Gauge]:
    if node.op_type == "MatMul":
        found = added_bias(node)
        bias = None if found is None else constant_array(found[0].inputs[found[1]])
    else:
        bias = constant_array(input_of(node, 2))
    size = 0.0 if bias is None else float(np.sqrt(np.mean(np.square(bias.astype(np.float64)))))
    if size > 0:
        axis = 1 if node.op_type == "Conv" else -1
        yield _Gauge(node, read, node.outputs[0], axis, np.asarray([size]), from_training=False)


def _factors(model: Model, gauges: list[_Gauge], data: InputData) -> list[float]:
    """Of each gauge: the median over channels of deviation / usual deviation; 1 where a small input tells nothing."""
    names = [value.name or "" for gauge in gauges for value in (gauge.read, gauge.sums)]
    seen = [(Moments(-1), Moments(gauge.axis)) for gauge in gauges]
    for values in stream(model, names, data.spread(SAMPLES), lambda: None) if names else ():
        for gauge, (reads, sums) in zip(gauges, seen, strict=True):
            reads.add(values[gauge.read.name or ""].reshape(-1, 1))
            sums.add(values[gauge.sums.name or ""])
    return [_factor(gauge, *moments) for gauge, moments in zip(gauges, seen, strict=True)]


class Moments:
    """Running mean and variance of each channel, which lie along `axis`: of blocks, put together as by Chan et al.
    (1979), so that a large mean takes no digits from the variance."""

    def __init__(self, axis: int) -> None:
        self._axis, self._count = axis, 0
        self.means: NDArray[np.float64] = np.zeros(1)
        self._squares: NDArray[np.float64] = np.zeros(1)  # of what is left without the means, summed up

    def add(self, values: Array) -> None:
        """Those of one sample."""
        for part in parts_along(values, self._axis):
            rows = np.moveaxis(part, self._axis, -1).reshape(-1, values.shape[self._axis]).astype(np.float64)
            total, means = self._count + len(rows), rows.mean(axis=0)
            off = means - self.means
            self._squares = self._squares + rows.var(axis=0) * len(rows) + off**2 * (self._count * len(rows) / total)
            self.means, self._count = self.means + off * (len(rows) / total), total

    @property
    def variances(self) -> NDArray[np.float64]:
        return self._squares / max(1, self._count)


def _factor(gauge: _Gauge, reads: Moments, sums: Moments) -> float:
    size = float(np.sqrt(reads.variances + reads.means**2)[0])
    if not gauge.from_training and size < LARGE_INPUT:
        return 1.0
    return float(np.median(np.sqrt(sums.variances) / gauge.usual))
