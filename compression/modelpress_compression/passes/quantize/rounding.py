"""How real weights become integer levels once their scales are chosen: to the nearest, or by a rounder that knows more.

A `Rounder` gives the rounding of one node's weight (its second input). The rounding works in the layout that the weight
has in the graph: `weight`, `scale`, `low` and `high` broadcast against each other, and so do their transposed forms, so
that it serves a scale per tensor, per channel or per block alike.
"""

from __future__ import annotations

from collections.abc import Callable
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


class NearestRounder:
    """Every weight to the nearest level."""

    def rounding(self, node: onnx_ir.Node) -> Rounding:
        """The same for all nodes."""
        return nearest
