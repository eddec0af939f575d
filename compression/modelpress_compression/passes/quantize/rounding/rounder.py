"""How real weights become integer levels once their scales are chosen: to the nearest, or by a rounder that knows more.

A `Rounder` gives the rounding of one node's weight (its second input). The rounding works in the layout that the weight
has in the graph: `weight`, `scale`, `low` and `high` broadcast against each other, and so do their transposed forms, so
that it serves a scale per tensor, per channel or per block alike.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Protocol

import numpy as np
import onnx_ir
from numpy.typing import NDArray

from modelpress_compression.graph.read import is_constant, is_op
from modelpress_compression.model import Model

Numbers = NDArray[np.floating[Any]]
# (weight, scale, low, high) -> whole numbers in [low, high], of the weight's shape: weight ~ levels * scale.
Rounding = Callable[[Numbers, Numbers, Numbers, Numbers], Numbers]


class Rounder(Protocol):
    """Chooses the rounding for a node's weight."""

    def rounding(self, node: onnx_ir.Node) -> Rounding:
        """That of the node's second input; using it raises TimeLimitError where time is up."""
        ...


def nearest(weight: Numbers, scale: Numbers, low: Numbers, high: Numbers) -> Numbers:
    """The level next to each weight, by itself."""
    levels: Numbers = np.clip(np.rint(weight / scale), low, high)
    return levels


class NearestRounder:
    """Every weight to the nearest level."""

    def rounding(self, node: onnx_ir.Node) -> Rounding:
        """The same for all nodes."""
        return nearest


def rounded_nodes(model: Model) -> list[onnx_ir.Node]:
    """Nodes of the main graph whose weights can be rounded in other ways than to the nearest level."""
    return [node for node in model.graph if is_op(node, "Conv", "MatMul", "Gemm") and is_constant(node.inputs[1])]


class RememberingRounder:
    """Another rounder's work on one model, for clones of it: done once for each weight and scale, found by the weight's
    name. Weights of other nodes are rounded to the nearest."""

    def __init__(self, rounder: Rounder, nodes: Iterable[onnx_ir.Node]) -> None:
        weights = {weight_name(node): node for node in nodes}
        self._roundings = {name: _remembering(rounder.rounding(node)) for name, node in weights.items()}

    def rounding(self, node: onnx_ir.Node) -> Rounding:
        """That of the node whose weight has this name."""
        return self._roundings.get(weight_name(node), nearest)

    def only(self, nodes: Iterable[onnx_ir.Node]) -> RememberingRounder:
        """The same, for the weights of these nodes alone."""
        return RememberingRounder(self, nodes)


def weight_name(node: onnx_ir.Node) -> str:
    """Of a node's second input; empty where it has none."""
    weight = node.inputs[1]
    return (weight.name if weight is not None else None) or ""


def _remembering(rounding: Rounding) -> Rounding:
    """The same rounding, which does its work once for each scale. `nearest` stays what it is: its users know it."""
    if rounding is nearest or isinstance(rounding, _Remembered):
        return rounding
    return _Remembered(rounding)


class _Remembered:
    def __init__(self, rounding: Rounding) -> None:
        self._rounding = rounding
        self._levels: dict[bytes, NDArray[np.int16]] = {}

    def __call__(self, weight: Numbers, scale: Numbers, low: Numbers, high: Numbers) -> Numbers:
        key = b"|".join(np.asarray(part).tobytes() for part in (scale, low, high))
        if key not in self._levels:
            self._levels[key] = self._rounding(weight, scale, low, high).astype(np.int16)
        return self._levels[key].astype(np.float32)
