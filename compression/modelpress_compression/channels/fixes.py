"""What has to change in a graph besides its weights when labels are cut.

The analysis records a fix wherever an attribute or a constant holds an extent, an index or a bound of a labelled axis;
the cut applies those whose labels were really cut.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import onnx_ir

from modelpress_compression.channels.integers import Small
from modelpress_compression.channels.labels import AxisLabels, Ints, ValueLabels


@dataclass(frozen=True)
class Count:
    """The INT attribute `attribute` counts the labels: `group`, `num_heads`, `hidden_size`."""

    node: onnx_ir.Node
    attribute: str
    labels: Ints


@dataclass(frozen=True)
class Extents:
    """Input `position` holds the extents of `axes`: the target of Reshape or Expand, the sizes of Resize."""

    node: onnx_ir.Node
    position: int
    axes: ValueLabels


@dataclass(frozen=True)
class Parts:
    """The node splits an axis into parts with these labels; `attribute` holds their extents where it has one."""

    node: onnx_ir.Node
    parts: tuple[Ints, ...]
    attribute: str = "split"


@dataclass(frozen=True)
class SliceBounds:
    """The node slices axes with step 1: number in its list of axes -> (labels of the whole axis, start, end)."""

    node: onnx_ir.Node
    slices: dict[int, tuple[Ints, int, int]] = field(default_factory=dict)


@dataclass(frozen=True)
class Positions:
    """Input 1 holds indices into an axis with these labels; what they name is `picked` (labels as well)."""

    node: onnx_ir.Node
    whole: Ints
    picked: Ints


@dataclass(frozen=True)
class Places:
    """Input 1 holds places in a flat view of a value with these axes, for each of `rows` (0, 1, 2, ...)."""

    node: onnx_ir.Node
    rows: onnx_ir.Value
    axes: ValueLabels


@dataclass(frozen=True)
class Number:
    """The node computes a float from the extents of axes with these labels, such as the scale of attention.

    It is `number` in the full network, and what is left of that still computes with it.
    """

    node: onnx_ir.Node
    number: Small
    labels: tuple[Ints, ...]


Fix = Count | Extents | Parts | SliceBounds | Positions | Places | Number


def labels_of(fix: Fix) -> tuple[AxisLabels, ...]:
    """All labels that a fix depends on."""
    if isinstance(fix, Count):
        return (fix.labels,)
    if isinstance(fix, Number):
        return fix.labels
    if isinstance(fix, Extents | Places):
        return fix.axes
    if isinstance(fix, Parts):
        return fix.parts
    if isinstance(fix, SliceBounds):
        return tuple(whole for whole, _, _ in fix.slices.values())
    return (fix.whole, fix.picked)
