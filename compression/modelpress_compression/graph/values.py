"""Values that an input would plausibly hold, read off what the graph does with it.

- bool: True. Masks (by name, or integers that are only compared, cast and multiplied): ones.
- integers that index an embedding (Gather, OneHot, EmbedLayerNormalization): within its rows.
- one-element integers: a sample rate where the name says so, else 1.
- strings: words that LabelEncoder, TfIdfVectorizer and the like know.
- uint8: 0 to 255, as in images.
- floats: N(0, 1) after the normalization that the graph begins with (Sub, Div, Mul, Add by constants;
  BatchNormalization), so that an image model that normalizes its own input sees image-like numbers.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from typing import Any

import numpy as np
import onnx_ir
from numpy.typing import NDArray

from modelpress_compression.graph.read import (
    constant_array,
    constant_scalar,
    constant_tensor,
    extent,
    float_attribute,
    int_attribute,
)
from modelpress_compression.inputs import Array
from modelpress_compression.specs import TensorSpec

# How many different guesses there are for what the graph does not tell; `attempt` counts through them.
ATTEMPTS = 3
SAMPLE_RATES_HZ = (16_000, 8_000, 44_100)
_UNKNOWN_INDEX_BOUNDS = (10, 2, 1)
_UNKNOWN_SCALARS = (1, 0, 2)
_MASK = re.compile(r"mask|padding|valid", re.IGNORECASE)
_SAMPLE_RATE = re.compile(r"^sr$|sample_?rate|sampling_?rate|(^|_)sr(_|$)", re.IGNORECASE)
# Through these an index stays an index.
_INDEX_CARRIERS = frozenset((
    "Cast", "Identity", "Reshape", "Unsqueeze", "Squeeze", "Flatten", "Transpose", "Slice", "Where", "Clip", "Expand",
    "Max", "Min", "Concat", "StringNormalizer",
))  # fmt: skip
_MASK_CONSUMERS = frozenset((
    "Equal", "Not", "And", "Or", "Greater", "GreaterOrEqual", "Less", "LessOrEqual", "Sub", "Mul", "Where", "ReduceSum",
    "Shape",
))  # fmt: skip
_EMBEDDED_INDICES = {0: 2, 1: 4}  # EmbedLayerNormalization: which input is indexed by input_ids and by segment_ids
_MAX_HOPS = 12
_VOCABULARIES = ("keys_strings", "pool_strings", "cats_strings", "classlabels_strings", "string_vocabulary")
_MAX_WORDS = 1000


def plausible_values(
    value: onnx_ir.Value, spec: TensorSpec, shape: tuple[int, ...], rng: np.random.Generator, attempt: int = 0
) -> Array:
    """Values of `shape` (axes may stand in front of the input's own) for the graph input `value`.

    `attempt`, 0 to ATTEMPTS - 1, varies what the graph leaves open.
    """
    dtype = spec.array_dtype
    if dtype.kind == "U":
        return np.asarray(rng.choice(_words(value), shape))
    if dtype.kind == "b" or _MASK.search(spec.name):
        return np.ones(shape, dtype)
    if dtype.kind in "iu":
        return np.asarray(_integers(value, spec, shape, rng, attempt), dtype)
    if _SAMPLE_RATE.search(spec.name) and math.prod(spec.concrete_shape()) == 1:
        return np.full(shape, SAMPLE_RATES_HZ[attempt], dtype)
    noise = np.asarray(rng.standard_normal(shape))
    scale, offset = _first_normalization(value)
    if _broadcasts(scale, shape) and _broadcasts(offset, shape):
        noise = (noise - offset) / scale
    return np.asarray(noise, dtype)  # without axes, arithmetic gives a number in place of an array


def _words(value: onnx_ir.Value) -> list[str]:
    """Words that the graph knows: what its first encoder of strings maps, else a few of any kind."""
    for node, _ in _consumers(value):
        for name in _VOCABULARIES:
            if name in node.attributes and (words := node.attributes[name].as_strings()):
                return [str(word) for word in words[:_MAX_WORDS]]
    return ["a", "b", "the", "model"]


def is_certain(value: onnx_ir.Value, spec: TensorSpec) -> bool:
    """Whether further attempts would give the same values, or values of the same kind."""
    dtype = spec.array_dtype
    if dtype.kind == "U":
        return True
    if dtype.kind == "f":
        return not _SAMPLE_RATE.search(spec.name)
    return dtype.kind == "b" or bool(_MASK.search(spec.name)) or index_bound(value) is not None


def _integers(
    value: onnx_ir.Value, spec: TensorSpec, shape: tuple[int, ...], rng: np.random.Generator, attempt: int
) -> Array:
    bound = index_bound(value)
    if bound is not None:
        return rng.integers(0, max(bound, 1), shape)
    if math.prod(spec.concrete_shape()) == 1 and len(spec.shape) <= 1:
        choices = SAMPLE_RATES_HZ if _SAMPLE_RATE.search(spec.name) else _UNKNOWN_SCALARS
        return np.full(shape, choices[attempt])
    if spec.dtype == "uint8":
        return rng.integers(0, 256, shape)
    if attempt == 0 and _is_mask(value):
        return np.ones(shape, np.int64)
    return rng.integers(0, _UNKNOWN_INDEX_BOUNDS[attempt], shape)


def index_bound(value: onnx_ir.Value) -> int | None:
    """The smallest number of rows among all tables that the value indexes; None where it indexes none."""
    bounds = [bound for node, position in _consumers(value) if (bound := _rows(node, position)) is not None]
    return min(bounds, default=None)


def _consumers(value: onnx_ir.Value) -> Iterator[tuple[onnx_ir.Node, int]]:
    """Nodes, and at which input, that the value reaches unchanged."""
    frontier, seen = [(value, 0)], {id(value)}
    while frontier:
        current, hops = frontier.pop()
        for node, position in current.uses():
            yield node, position
            if node.op_type in _INDEX_CARRIERS and hops < _MAX_HOPS:
                for output in node.outputs:
                    if id(output) not in seen:
                        seen.add(id(output))
                        frontier.append((output, hops + 1))


def _rows(node: onnx_ir.Node, position: int) -> int | None:
    if node.op_type in ("Gather", "GatherBlockQuantized") and position == 1:
        axis = "axis" if node.op_type == "Gather" else "gather_axis"
        return _table_extent(node.inputs[0], int_attribute(node, axis, 0))
    if node.op_type == "OneHot" and position == 0:
        depth = constant_scalar(node.inputs[1])
        return None if depth is None else int(depth)
    if node.op_type == "EmbedLayerNormalization" and position in _EMBEDDED_INDICES:
        return _table_extent(node.inputs[_EMBEDDED_INDICES[position]], 0)
    return None


def _table_extent(table: onnx_ir.Value | None, axis: int) -> int | None:
    """How many rows there are to look up, also where the table is stored in fewer bits and converted on the way."""
    for _ in range(_MAX_HOPS):
        if table is None:
            return None
        if (rows := extent(table, axis)) is not None:
            return rows
        producer = table.producer()
        if producer is None or producer.op_type not in ("Cast", "DequantizeLinear", "Identity"):
            return None
        table = producer.inputs[0]
    return None


def _is_mask(value: onnx_ir.Value) -> bool:
    ends = {node.op_type for node, _ in _consumers(value) if node.op_type not in _INDEX_CARRIERS}
    return bool(ends) and ends <= _MASK_CONSUMERS


def _first_normalization(value: onnx_ir.Value) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """(scale, offset) of the affine chain y = scale * x + offset that the graph begins with; (1, 0) without one."""
    scale, offset = np.ones(()), np.zeros(())
    current = value
    for _ in range(_MAX_HOPS):
        uses = list(current.uses())
        if len(uses) != 1:
            break
        node, position = uses[0]
        if node.op_type == "BatchNormalization" and position == 0:
            return _through_batch_norm(node, scale, offset)
        step = _affine_step(node, position)
        if step is None:
            break
        scale, offset = step[0] * scale, step[0] * offset + step[1]
        current = node.outputs[0]
    usable = bool(np.isfinite(scale).all() and np.isfinite(offset).all() and (np.abs(scale) > 1e-12).all())
    return (scale, offset) if usable else (np.ones(()), np.zeros(()))


def _affine_step(node: onnx_ir.Node, position: int) -> tuple[Any, Any] | None:
    """(scale, offset) of one node, None where it is not affine in its input with constants."""
    if node.op_type in ("Cast", "Identity"):
        return 1.0, 0.0
    if node.op_type not in ("Sub", "Add", "Mul", "Div"):
        return None
    tensor = constant_tensor(node.inputs[1 - position])
    if tensor is None or tensor.dtype.bitwidth < 16:
        return None
    constant = tensor.numpy().astype(np.float64)
    if node.op_type == "Sub":
        return (1.0, -constant) if position == 0 else (-1.0, constant)
    if node.op_type == "Div":
        return (1.0 / constant, 0.0) if position == 0 and np.all(constant != 0) else None
    return (1.0, constant) if node.op_type == "Add" else (constant, 0.0)


def _through_batch_norm(
    node: onnx_ir.Node, scale: NDArray[np.float64], offset: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """(x - mean) / sqrt(variance + epsilon), channels on axis 1: after it, activations were N(0, 1) in training."""
    mean, variance = (constant_array(item) for item in node.inputs[3:5])
    rank = len(node.inputs[0].shape) if node.inputs[0] is not None and node.inputs[0].shape is not None else 4
    if mean is None or variance is None:
        return scale, offset
    epsilon = float_attribute(node, "epsilon", 1e-5)
    column = (-1, *([1] * (rank - 2)))
    deviation = np.sqrt(variance.astype(np.float64) + epsilon).reshape(column)
    return scale / deviation, (offset - mean.astype(np.float64).reshape(column)) / deviation


def _broadcasts(constant: NDArray[np.float64], shape: tuple[int, ...]) -> bool:
    try:
        return np.broadcast_shapes(constant.shape, shape) == shape
    except ValueError:
        return False
