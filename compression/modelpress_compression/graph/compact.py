"""A model as it is written into a file: the same numbers in fewer bytes.

    a float32 constant that is one number throughout     Expand(number, shape)
    a float32 constant that 16 bits hold exactly         Cast(float16 or bfloat16)
    scales of biases, products of two other scales       Mul (bias_scales.py)
    small constants that are equal                       one
    shapes of values between standard operators, and
    names of nodes that came without                     left out: whoever loads the file finds them
    names of conversions that passes made                left out
    names of values between nodes that passes made       a letter and a number
    what exporters write for debugging (metadata.py)     left out

onnxruntime computes the first three when it loads the model, so that latency and memory stay as they are. Passes work
on plain constants; it is only what is written that is compact.
"""

from __future__ import annotations

from collections.abc import Hashable
from itertools import count

import ml_dtypes
import numpy as np
import onnx_ir
from numpy.typing import NDArray

from modelpress_compression.graph import bias_scales
from modelpress_compression.graph.edit import Editor, Spot
from modelpress_compression.graph.metadata import clear_debug_metadata
from modelpress_compression.graph.read import constant_array, constant_tensor, is_op, is_overwritten
from modelpress_compression.graph.subgraphs import subgraphs
from modelpress_compression.model import GIVEN_NAME, MADE, Model

MIN_BYTES = 1024  # 1 KiB: a node and its names take up to 200 bytes
_MAX_EQUAL_BYTES = 1024
_GLIMPSE = 256  # elements of a constant that tell nearly always
_STANDARD_DOMAINS = ("", "ai.onnx.ml")
# Whose names nobody looks for. Those of layers that passes made stay: people find them in a viewer.
_CONVERSIONS = ("QuantizeLinear", "DequantizeLinear", "Cast", "Expand", "Mul")
_NARROW = (np.dtype(np.float16), np.dtype(ml_dtypes.bfloat16))
# They want constants, or numbers that are constants when onnxruntime looks for its patterns.
_WANT_CONSTANTS = ("QuantizeLinear", "DequantizeLinear", "Loop", "Scan", "If")


def compacted(model: Model, *, weights: bool = True) -> Model:
    """A copy to be written into a file. `weights` False: it is given back as it was, with its weights in the types that
    they have."""
    clone = model.clone()
    if weights:
        clear_debug_metadata(clone.ir)
        editor = Editor(clone)
        for graph in list(clone.graphs()):
            for value in list(graph.initializers.values()):
                _narrow(editor, graph, value)
            bias_scales.share(editor, graph)
    _shorten_names(clone)
    for graph in list(clone.graphs()):
        _merge_small(graph)
        _forget_derived(graph, inner=graph is not clone.graph)
    return clone


def stored_bytes(array: NDArray[np.generic]) -> int:
    """What a constant takes in a file that `compacted` has seen to."""
    if array.dtype != np.float32 or array.nbytes < MIN_BYTES:
        return array.nbytes
    if _is_uniform(array):
        return array.itemsize
    return array.nbytes // 2 if _exact_dtype(array) is not None else array.nbytes


def _narrow(editor: Editor, graph: onnx_ir.Graph, value: onnx_ir.Value) -> None:
    tensor = constant_tensor(value)
    if tensor is None or tensor.dtype != onnx_ir.DataType.FLOAT or tensor.nbytes < MIN_BYTES or not len(graph):
        return
    if value.is_graph_output() or any(is_op(user, *_WANT_CONSTANTS) for user in value.consumers()):
        return
    array = constant_array(value)
    if array is None:
        return
    head = Spot(editor, graph[0], value.name or "constant")
    if _is_uniform(array):
        number = head.constant(array.reshape(-1)[0], "number")
        real = head.emit("Expand", number, head.constant(np.asarray(array.shape, np.int64), "shape"))
    elif (dtype := _exact_dtype(array)) is not None:
        real = head.real(head.constant(array.astype(dtype), dtype.name))
    else:
        return
    name = value.name or ""
    real.type, real.shape = value.type, value.shape
    onnx_ir.convenience.replace_all_uses_with(value, real)
    del graph.initializers[name]
    real.name = name


def _is_uniform(array: NDArray[np.generic]) -> bool:
    flat = array.reshape(-1)
    return bool((flat[:_GLIMPSE] == flat[0]).all() and (flat == flat[0]).all())


def _exact_dtype(array: NDArray[np.generic]) -> np.dtype[np.generic] | None:
    """The type of 16 bits that holds all of the numbers; None: neither does."""
    flat = array.reshape(-1)
    return next((dtype for dtype in _NARROW if _holds(dtype, flat[:_GLIMPSE]) and _holds(dtype, flat)), None)


def _holds(dtype: np.dtype[np.generic], numbers: NDArray[np.generic]) -> bool:
    with np.errstate(over="ignore"):
        return bool((numbers.astype(dtype).astype(np.float32) == numbers).all())


def _merge_small(graph: onnx_ir.Graph) -> None:
    """Names count: a shape of one number takes 8 bytes, and 50 with its name."""
    first: dict[Hashable, onnx_ir.Value] = {}
    for name, value in list(graph.initializers.items()):
        tensor = constant_tensor(value)
        if tensor is None or tensor.nbytes > _MAX_EQUAL_BYTES or tensor.dtype.is_string() or value.is_graph_output():
            continue
        if is_overwritten(value):
            continue
        kept = first.setdefault((tensor.dtype, tuple(tensor.shape.numpy()), tensor.tobytes()), value)
        if kept is not value:
            value.replace_all_uses_with(kept)
            del graph.initializers[name]


def _forget_derived(graph: onnx_ir.Graph, *, inner: bool) -> None:
    """Names that the loader makes, and shapes of operators that ONNX itself knows; of others nobody else can tell.

    `inner`: the graph is that of a branch or a loop, whose outputs need no shapes, but types. Of a loop's inputs
    onnxruntime wants both; of SequenceMap's it wants types alone.
    """
    for node in graph:
        is_made = node.meta.get(MADE) and is_op(node, *_CONVERSIONS)
        if is_made or node.name == node.meta.get(GIVEN_NAME):
            node.name = ""  # None has a copy make up one
        for body in subgraphs(node).values() if is_op(node, "SequenceMap") else ():
            for value in body.inputs:
                value.shape = None
        for value in node.outputs if node.domain in _STANDARD_DOMAINS else ():
            if not value.is_graph_output():
                value.shape = value.type = None
            elif inner:
                value.shape = None


def _shorten_names(model: Model) -> None:
    """A value's name stands with its maker and with each reader. Those that came with the model stay, and those of
    constants, which say what weight they are of; `Editor.make` names values after the nodes that it makes."""
    taken = {value.name for graph in model.graphs() for value in (*graph.inputs, *graph.initializers.values())}
    taken.update(value.name for node in model.nodes() for value in node.outputs)
    short = (name for number in count() if (name := f"v{number}") not in taken)
    for node in model.nodes():
        made = f"_{node.op_type}".join((node.name or "").rsplit(f"/{node.op_type}", 1))
        for value in node.outputs:
            if made != node.name and value.name and value.name.startswith(made) and not value.is_graph_output():
                value.name = next(short)
