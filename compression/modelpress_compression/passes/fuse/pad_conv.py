"""A Pad of zeros before Conv becomes the Conv's own padding.

    Conv(Pad(x, p), pads=q)  =  Conv(x, pads = p + q)

for constant mode with value 0, p without padding of batch and channels, p >= 0, and auto_pad NOTSET. `pads` lists all
begins, then all ends: Pad for every axis, Conv for the spatial ones. It must not fire for other modes or values
(reflect has no counterpart), for negative pads (those crop), or when the padded value is used elsewhere.
"""

from __future__ import annotations

from typing import ClassVar

import onnx_ir

from modelpress_compression.graph.read import (
    constant_array,
    constant_scalar,
    constant_tensor,
    float_attribute,
    input_of,
    ints_attribute,
    only_consumer,
    string_attribute,
)
from modelpress_compression.passes.fuse.rewriting import FIRED, Outcome, Scope


class FusePadConv:
    """Merges a constant Pad of zeros into the Conv behind it."""

    name: ClassVar[str] = "pad_conv"
    op_types: ClassVar[frozenset[str]] = frozenset({"Conv"})

    def __call__(self, node: onnx_ir.Node, scope: Scope) -> Outcome:
        pad = scope.producer(node.inputs[0], "Pad")
        if pad is None or pad.graph is not node.graph:
            return None
        weight = constant_tensor(node.inputs[1])
        pads = _pads(pad)
        if weight is None or pads is None:
            return "Pad stays: its amounts, or the weight of Conv, are not constant."
        if (reason := _why_not(pad, node)) is not None:
            return f"Pad stays: {reason}."
        rank = len(weight.shape)
        begins, ends = pads[: len(pads) // 2], pads[len(pads) // 2 :]
        if len(begins) != rank or any((*begins[:2], *ends[:2])) or min(pads) < 0:
            return "Pad stays: it crops, or pads more than the spatial axes."
        # VALID means no padding, whatever `pads` says.
        valid = string_attribute(node, "auto_pad", "NOTSET") == "VALID"
        own = (not valid and ints_attribute(node, "pads")) or (0,) * (2 * (rank - 2))
        total = [a + b for a, b in zip(own, (*begins[2:], *ends[2:]), strict=True)]
        kept = [a for a in node.attributes.values() if a.name not in ("pads", "auto_pad")]
        made = scope.make_like(
            node, "Conv", [pad.inputs[0], *node.inputs[1:]], [*kept, onnx_ir.AttrInt64s("pads", total)]
        )
        scope.replace(node, [pad, node], [made])
        return FIRED


def _why_not(pad: onnx_ir.Node, conv: onnx_ir.Node) -> str | None:
    if string_attribute(pad, "mode", "constant") != "constant":
        return f"Conv knows no padding of mode {string_attribute(pad, 'mode', 'constant')!r}"
    value = input_of(pad, 2)
    number = float_attribute(pad, "value", 0.0) if value is None else constant_scalar(value)
    if number != 0:
        return "it pads with other values than zeros"
    if input_of(pad, 3) is not None:
        return "it pads chosen axes"
    if only_consumer(pad.outputs[0]) is None:
        return "the padded value is used elsewhere as well"
    if string_attribute(conv, "auto_pad", "NOTSET") not in ("NOTSET", "VALID"):
        return "Conv pads itself automatically"
    return None


def _pads(pad: onnx_ir.Node) -> tuple[int, ...] | None:
    """The amounts: an attribute up to opset 10, then the second input."""
    if (pads := ints_attribute(pad, "pads")) is not None:
        return pads
    array = constant_array(input_of(pad, 1))
    return None if array is None else tuple(int(amount) for amount in array.reshape(-1))
