"""Operators in forms around which onnxruntime can put 8 bits; each computes what it did.

1. AveragePool with dilations of 1: without the attribute, which QLinearAveragePool does not know.
2. AveragePool with ceil_mode and count_include_pad: QLinearAveragePool divides by more than there is. Zeros around the
   input by a Pad count as well, and without padding there is nothing to count. Where no window begins behind the input:

       AveragePool(x; pads, ceil_mode, count_include_pad) = AveragePool(Pad(x, pads); ceil_mode)

3. Resize and Pad along some axes: onnxruntime computes convolutions in 8 bits with channels last, moves the Transpose
   behind them through what follows, and reorders scales, sizes and pads as if there was one for every axis. So there
   is:

       Resize(x, scales; axes)    scales of 1 along the others
       Resize(x, sizes; axes)     sizes from Shape(x) in front; axes are the last ones, in order
       Pad(x, pads, axes)         pads of 0 along the others

What has no such form is left as it is, and `dead_ends` keeps 8 bits away from it. References: the operators' ONNX
specifications; onnxruntime's onnx_transpose_optimization.cc, HandleResize and HandlePad.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx_ir
from numpy.typing import NDArray

from modelpress_compression.graph.edit import Editor
from modelpress_compression.graph.read import (
    constant_array,
    graph_of,
    input_of,
    int_attribute,
    ints_attribute,
    is_op,
    label,
    rank,
    required,
    string_attribute,
)
from modelpress_compression.model import Model


def make_plain(model: Model, editor: Editor) -> None:
    """Rewrites nodes of the main graph in place; nothing else is quantized statically."""
    for node in list(model.graph):
        if is_op(node, "AveragePool"):
            _make_pooling_plain(node, editor)
        elif is_op(node, "Resize", "Pad") and (axes := axes_in_part(node)) is not None:
            _name_all_axes(node, axes, editor)


def has_8_bit_pooling(pooling: onnx_ir.Node) -> bool:
    """Whether QLinearAveragePool computes what an AveragePool does."""
    return "dilations" not in pooling.attributes and not _counts_padding_behind(pooling)


def axes_in_part(node: onnx_ir.Node) -> Sequence[int] | None:
    """The axes that a Resize or Pad names, where it does not name all of them in order; None: it does, or none at all.

    Empty: they are not known.
    """
    if node.op_type == "Resize":
        axes = ints_attribute(node, "axes")
    elif input_of(node, 3) is None:
        axes = None
    else:
        given = constant_array(input_of(node, 3))
        axes = () if given is None else tuple(int(axis) for axis in given.reshape(-1))
    axes_of_all = rank(node.inputs[0])
    if axes is None:
        return None
    if axes_of_all is None:
        return ()
    axes = tuple(axis % axes_of_all for axis in axes)
    return None if axes == tuple(range(axes_of_all)) else axes


def _make_pooling_plain(node: onnx_ir.Node, editor: Editor) -> None:
    if all(dilation == 1 for dilation in ints_attribute(node, "dilations") or ()):
        node.attributes.pop("dilations", None)
    if not _counts_padding_behind(node):
        return
    pads = ints_attribute(node, "pads") or ()
    if any(pads) and string_attribute(node, "auto_pad", "NOTSET") == "NOTSET":
        if not _windows_begin_before(pads, node):
            return
        half = len(pads) // 2
        amounts = _constant(node, np.asarray([0, 0, *pads[:half], 0, 0, *pads[half:]], np.int64), "pads", editor)
        (padded,) = editor.emit(node, "Pad", [required(node, 0), amounts], label(node))
        node.replace_input_with(0, padded)
        node.attributes.pop("pads")
    node.attributes.pop("count_include_pad")


def _windows_begin_before(pads: Sequence[int], node: onnx_ir.Node) -> bool:
    """Whether all windows begin before the padding behind the input: one that did not would not count, but zeros would
    give it something to begin in."""
    kernel = ints_attribute(node, "kernel_shape") or ()
    strides = ints_attribute(node, "strides") or (1,) * len(kernel)
    behind = pads[len(pads) // 2 :]
    return all(not pad or stride + pad <= size for pad, stride, size in zip(behind, strides, kernel, strict=True))


def _counts_padding_behind(pooling: onnx_ir.Node) -> bool:
    """Whether it counts padding in windows that may reach beyond it, as those of SAME_UPPER and SAME_LOWER do not."""
    counts = int_attribute(pooling, "ceil_mode", 0) and int_attribute(pooling, "count_include_pad", 0)
    return bool(counts) and string_attribute(pooling, "auto_pad", "NOTSET") in ("NOTSET", "VALID")


def _name_all_axes(node: onnx_ir.Node, axes: Sequence[int], editor: Editor) -> None:
    count = rank(node.inputs[0])
    if count is None or not axes:
        return
    if node.op_type == "Resize":
        _name_axes_of_resize(node, axes, count, editor)
    elif (pads := constant_array(input_of(node, 1))) is not None:
        whole = [_spread(half, axes, np.zeros(count, np.int64)) for half in np.split(pads, 2)]
        node.replace_input_with(1, _constant(node, np.concatenate(whole), "pads", editor))
        node.replace_input_with(3, None)


def _name_axes_of_resize(node: onnx_ir.Node, axes: Sequence[int], count: int, editor: Editor) -> None:
    region, scales, sizes = (_given(node, index) for index in (1, 2, 3))
    if region is not None:
        return
    if (factors := constant_array(scales)) is not None:
        whole = _spread(factors, axes, np.ones(count, np.float32))
        node.replace_input_with(2, _constant(node, whole, "scales", editor))
    elif sizes is not None and string_attribute(node, "keep_aspect_ratio_policy", "stretch") == "stretch":
        first = count - len(axes)
        if tuple(axes) != tuple(range(first, count)):
            return
        (others,) = editor.emit(node, "Shape", [required(node, 0)], label(node), attributes={"end": first})
        (whole_sizes,) = editor.emit(node, "Concat", [others, sizes], label(node), attributes={"axis": 0})
        node.replace_input_with(3, whole_sizes)
    else:
        return
    node.attributes.pop("axes")


def _given(node: onnx_ir.Node, index: int) -> onnx_ir.Value | None:
    """An input that holds something: an empty constant stands for one that is not there."""
    value = input_of(node, index)
    array = constant_array(value)
    return None if array is not None and not array.size else value


def _spread(given: NDArray[Any], axes: Sequence[int], whole: NDArray[Any]) -> NDArray[Any]:
    """`whole`, with what is given for some axes."""
    whole[list(axes)] = given
    return whole


def _constant(node: onnx_ir.Node, array: NDArray[Any], what: str, editor: Editor) -> onnx_ir.Value:
    return editor.constant(graph_of(node), array, f"{label(node)}_{what}")
