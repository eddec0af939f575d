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

Numbers = NDArray[np.floating[Any]]
# (weight, scale, low, high) -> whole numbers in [low, high], of the weight's shape: weight ~ levels * scale.
Rounding = Callable[[Numbers, Numbers, Numbers, Numbers], Numbers]


class Rounder(Protocol):
    """Chooses the rounding for a node's weight."""

    def rounding(self, node: onnx_ir.Node) -> Rounding:
        """That of the node's second input; raises TimeLimitError where it takes time and there is none left."""
        ...


def nearest(weight: Numbers, scale: Numbers, low: Numbers, high: Numbers) -> Numbers:
    """The level next to each weight, by itself."""
    levels: Numbers = np.clip(np.rint(weight / scale), low, high)
    return levels


class RememberingRounder:
    """Another rounder's work on one model, for clones of it: done once for each weight and scale, found by the weight's
    name."""

    def __init__(self, rounder: Rounder, nodes: Iterable[onnx_ir.Node]) -> None:
        self._rounder = rounder
        self._nodes = {
            node.inputs[1].name: node for node in nodes if len(node.inputs) > 1 and node.inputs[1] is not None
        }
        self._roundings: dict[str | None, Rounding] = {}
        self._levels: dict[tuple[str | None, bytes], NDArray[np.int16]] = {}

    def rounding(self, node: onnx_ir.Node) -> Rounding:
        """That of the node whose weight has this name."""
        name = node.inputs[1].name if node.inputs[1] is not None else None
        if name not in self._nodes:
            return nearest
        if name not in self._roundings:
            self._roundings[name] = self._rounder.rounding(self._nodes[name])
        inner = self._roundings[name]

        def remembered(weight: Numbers, scale: Numbers, low: Numbers, high: Numbers) -> Numbers:
            key = (name, b"|".join(np.asarray(part).tobytes() for part in (scale, low, high)))
            if key not in self._levels:
                self._levels[key] = inner(weight, scale, low, high).astype(np.int16)
            return self._levels[key].astype(np.float32)

        return inner if inner is nearest else remembered

    def only(self, nodes: Iterable[onnx_ir.Node]) -> RememberingRounder:
        """The same, for the weights of these nodes alone."""
        rounder = RememberingRounder(self._rounder, nodes)
        rounder._roundings, rounder._levels = self._roundings, self._levels
        return rounder


class NearestRounder:
    """Every weight to the nearest level."""

    def rounding(self, node: onnx_ir.Node) -> Rounding:
        """The same for all nodes."""
        return nearest
