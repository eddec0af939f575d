"""Scales of quantized models that are trained with the weights.

    s = s0 exp(t)        s0: the scale in the file; t: trained, 0 at first

Gradients are those of LSQ (Esser et al., arXiv:1902.08153), which the executor's QuantizeLinear has. Training t in
place of s (Jain et al., arXiv:1903.08066) keeps scales positive, and makes a step of the optimizer one in proportion,
however small a scale is. Zero points stay.

    activations    the pairs QuantizeLinear, DequantizeLinear with one scale. Those of the same scale and zero point
                   have one t: values that only move (Reshape, Concat) keep them in common, which saves time.
    weights        behind DequantizeLinear, one for all or one for each index of an axis (fake_quantization)
    biases         of integer products have the scale of input times weight, which onnxruntime takes for granted: they
                   are written anew for the trained scales

Only the main graph's: what lies in a branch may never be run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import onnx_ir
from numpy.typing import NDArray

from modelpress_compression.encodings.operands import operand
from modelpress_compression.encodings.products import FUSED
from modelpress_compression.encodings.read import stored_weights
from modelpress_compression.graph.edit import Editor, Spot, set_input
from modelpress_compression.graph.read import constant_array, input_of, is_op, label
from modelpress_compression.inputs import Array
from modelpress_compression.model import Model
from modelpress_compression.passes.base import is_excluded

BIAS_BITS = 32
_INT32 = np.iinfo(np.int32)


class Grid(NamedTuple):
    """The scale and the zero point of an activation, and the type of its integers."""

    scale: float
    zero_point: int
    dtype: str


@dataclass
class LearnedScales:
    """Those of one model. `activations`, `weights`: names of the trained t by the grid, or by the constant that stores
    the levels."""

    editor: Editor
    activations: dict[Grid, str] = field(default_factory=dict)
    weights: dict[str, str] = field(default_factory=dict)

    @property
    def trained(self) -> frozenset[str]:
        """Names of the constants to train."""
        return frozenset((*self.activations.values(), *self.weights.values()))

    def learn_activations(self, model: Model, exclude: tuple[str, ...]) -> None:
        """Puts computed scales in the place of those of activations, in place."""
        scales: dict[Grid, onnx_ir.Value] = {}
        spared = {grid for node, position, grid in _grids(model) if is_excluded(node.name, exclude)}
        for node, position, grid in list(_grids(model)):
            if grid in spared:
                continue
            if grid not in scales:
                spot = Spot(self.editor, model.graph[0], f"{label(node)}__trained")
                scales[grid], self.activations[grid] = self._scale(spot, np.asarray(grid.scale, np.float32))
            set_input(node, position, scales[grid])

    def weight_scale(self, spot: Spot, stored: str, scale: NDArray[np.float32]) -> onnx_ir.Value:
        """The computed scale of a weight, of as many numbers as `scale`."""
        value, self.weights[stored] = self._scale(spot, scale)
        return value

    @staticmethod
    def _scale(spot: Spot, scale: NDArray[np.float32]) -> tuple[onnx_ir.Value, str]:
        trained = spot.constant(np.zeros(scale.shape, np.float32), "log_scale")
        return spot.emit("Mul", spot.constant(scale), spot.emit("Exp", trained)), trained.name or ""

    def write(self, into: Model, trained: Callable[[str], Array | None], biases: Mapping[str, Array]) -> None:
        """Puts trained scales into the model that they were learned for, in place.

        `trained`: the numbers of a constant of the trained model by its name; `biases`: of those whose levels have 32
        bits, by the name of the constant that stores these.
        """
        writer = _Writer(Editor(into), self, trained)
        writer.activations(into)
        writer.weights(into)
        for node in list(into.graph):
            if is_op(node, "Conv", "Gemm"):
                writer.bias(node, biases)


def factors(numbers: Array | None) -> NDArray[np.float32] | None:
    """What a trained t makes of scales; None: there is none."""
    return None if numbers is None else np.exp(np.asarray(numbers, np.float32))


@dataclass
class _Writer:
    """Constants may be shared with what is not trained: new ones take the places of those that change."""

    editor: Editor
    learned: LearnedScales
    trained: Callable[[str], Array | None]
    _scales: dict[Grid, onnx_ir.Value] = field(default_factory=dict)

    def activations(self, model: Model) -> None:
        for node, position, grid in list(_grids(model)):
            factor = factors(self.trained(self.learned.activations.get(grid, "")))
            if factor is None:
                continue
            if grid not in self._scales:
                number = np.asarray(np.float32(grid.scale) * factor, np.float32).reshape(())
                self._scales[grid] = self.editor.constant(model.graph, number, f"{label(node)}_scale")
            set_input(node, position, self._scales[grid])

    def weights(self, model: Model) -> None:
        for node in list(model.graph):
            for stored in stored_weights(node):
                factor = factors(self.trained(self.learned.weights.get(stored.values.name or "", "")))
                old = constant_array(stored.scale)
                if factor is None or old is None or stored.scale is None:
                    continue
                position = list(node.inputs).index(stored.scale)
                scale = old.astype(np.float32) * factor.reshape(old.shape)
                set_input(node, position, self.editor.constant(model.graph, scale, f"{label(node)}_scale"))

    def bias(self, node: onnx_ir.Node, biases: Mapping[str, Array]) -> None:
        """Levels of the bias of a product for the scale of its input times that of its weight."""
        x, weight, bias = (_dequantized(node, position) for position in range(3))
        if x is None or weight is None or bias is None:
            return
        real = biases.get((bias.inputs[0].name or "") if bias.inputs[0] is not None else "")
        scales = [constant_array(input_of(source, 1)) for source in (x, weight)]
        if real is None or scales[0] is None or scales[1] is None or scales[0].size != 1:
            return
        product = scales[0].astype(np.float64).reshape(()) * scales[1].astype(np.float64).reshape(-1)
        scale = np.asarray(product if scales[1].size > 1 else product.reshape(()), np.float32)
        levels = np.clip(np.rint(real.astype(np.float64) / scale), _INT32.min, _INT32.max).astype(np.int32)
        graph = self.editor.ir.graph
        set_input(bias, 0, self.editor.constant(graph, levels, f"{label(bias)}_quantized"))
        set_input(bias, 1, self.editor.constant(graph, scale, f"{label(bias)}_scale"))


def _grids(model: Model) -> Iterator[tuple[onnx_ir.Node, int, Grid]]:
    """Each use of an activation's scale: the node, the place among its inputs, and the grid."""
    for node in model.graph:
        if is_op(node, "QuantizeLinear") or (is_op(node, "DequantizeLinear") and not stored_weights(node)):
            scale, zero = input_of(node, 1), input_of(node, 2)
        elif node.op_type == FUSED:
            scale, zero = operand(node, "x_scale"), operand(node, "x_zero")
        else:
            continue
        numbers, zeros = constant_array(scale), constant_array(zero)
        if numbers is None or zeros is None or numbers.size != 1 or zeros.size != 1 or numbers.dtype != np.float32:
            continue
        position = next(place for place, value in enumerate(node.inputs) if value is scale)
        yield node, position, Grid(float(numbers.reshape(())), int(zeros.reshape(())), zeros.dtype.name)


def _dequantized(node: onnx_ir.Node, position: int) -> onnx_ir.Node | None:
    """The DequantizeLinear that makes an input."""
    value = input_of(node, position)
    source = value.producer() if value is not None else None
    return source if source is not None and is_op(source, "DequantizeLinear") else None
