"""Scaled dot-product attention of several heads becomes com.microsoft.MultiHeadAttention.

With q, k, v of shapes [B, S, N], [B, L, N], [B, L, M], split into H heads of D = N / H,

    scores = scale * q_h k_h^T + mask        [B, H, S, L]
    y      = softmax(scores) v_h             [B, H, S, D], then transposed and reshaped to [B, S, M]

Vaswani et al., arXiv:1706.03762. The operator reads and writes the three-dimensional tensors, so that the reshapes and
transposes around the products go as well. The projections before and after it stay MatMul nodes: other passes quantize
and prune them as they are, which com.microsoft.Attention with its packed weights would not allow.

    heads    Transpose(Reshape(q), 0 2 1 3); keys also as Transpose(Reshape(k), 0 2 3 1), or with a further Transpose
    scale    Mul or Div with a constant behind the product, or on q, or on both q and k
    mask     one Add before the softmax: [B or 1, H or 1, S, L]; a mask [.., .., 1, L] is expanded to S rows once

It must not fire when scores or probabilities are used elsewhere (some models return them), or when the number of heads
is not a constant.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir

from modelpress_compression.graph.read import (
    MICROSOFT,
    constant_array,
    constant_scalar,
    extent,
    graph_of,
    int_attribute,
    ints_attribute,
    is_op,
    rank,
)
from modelpress_compression.passes.fuse.rewriting import FIRED, Outcome, Scope

_HEADS_FIRST = (0, 2, 1, 3)
_KEYS = (0, 2, 3, 1)
_SWAP = (0, 1, 3, 2)


@dataclass(frozen=True)
class _Heads:
    """A tensor [B, T, H * D] that is split into heads."""

    value: onnx_ir.Value
    count: int
    size: int


@dataclass(frozen=True)
class _Scores:
    """What goes into the softmax: the operands of the product, the scale so far, and the mask."""

    query: onnx_ir.Value | None
    keys: onnx_ir.Value | None
    scale: float
    mask: onnx_ir.Value | None


class FuseAttention:
    """Recognizes attention by its softmax."""

    name: ClassVar[str] = "attention"
    op_types: ClassVar[frozenset[str]] = frozenset({"Softmax"})

    def __call__(self, node: onnx_ir.Node, scope: Scope) -> Outcome:
        scores, product = _scores(node, scope), scope.follower(node, "MatMul")
        if scores is None or product is None or product.inputs[0] is not node.outputs[0]:
            return None
        query, scale_q = _heads(scores.query, _HEADS_FIRST, scope)
        keys, scale_k = _heads(scores.keys, _KEYS, scope)
        values, scale_v = _heads(product.inputs[1], _HEADS_FIRST, scope)
        last = _merged(product, scope)
        if query is None or keys is None or values is None or scale_v != 1.0:
            return "Attention stays: queries, keys or values are not [batch, tokens, heads * size] split by Reshape."
        if last is None:
            return "Attention stays: its heads are not put together again by Transpose and Reshape."
        if not query.count == keys.count == values.count or query.size != keys.size:
            return "Attention stays: queries, keys and values have different heads."
        mask = scores.mask
        if mask is not None and (mask.shape is None or len(mask.shape) != 4):
            return "Attention stays: its mask is not known to have four axes."
        new: list[onnx_ir.Node] = []
        if mask is not None:
            mask = _with_rows(mask, (query.value, keys.value), new, last, scope)
        inputs = [query.value, keys.value, values.value, *([None, None, mask] if mask is not None else [])]
        attributes = {"num_heads": query.count, "scale": scores.scale * scale_q * scale_k}
        new.append(scope.make_like(product, "MultiHeadAttention", inputs, attributes, domain=MICROSOFT))
        scope.replace(last, [last], new)
        return FIRED


def _scores(softmax: onnx_ir.Node, scope: Scope) -> _Scores | None:
    """scale * q k^T + mask before the softmax, each of scale and mask optional."""
    axis = int_attribute(softmax, "axis", -1 if scope.opset >= 13 else 1)
    value = softmax.inputs[0]
    if axis not in (-1, 3) or (axis == 3 and rank(value) not in (4, None)):
        return None
    mask = None
    if (add := scope.inner(value, "Add")) is not None:
        position = 0 if _is_product(add.inputs[0], scope) else 1
        value, mask = add.inputs[position], add.inputs[1 - position]
    scale = 1.0
    if (factor := scope.inner(value, "Mul", "Div")) is not None:
        if (constant := _factor(factor)) is None:
            return None
        value, scale = constant
    product = scope.inner(value, "MatMul")
    return None if product is None else _Scores(product.inputs[0], product.inputs[1], scale, mask)


def _is_product(value: onnx_ir.Value | None, scope: Scope) -> bool:
    node = scope.producer(value, "MatMul", "Mul", "Div")
    if node is None or node.op_type == "MatMul":
        return node is not None
    constant = _factor(node)
    return constant is not None and scope.producer(constant[0], "MatMul") is not None


def _factor(node: onnx_ir.Node) -> tuple[onnx_ir.Value, float] | None:
    """(y, c) of y * c or y / (1 / c)."""
    for position in (1, 0) if node.op_type == "Mul" else (1,):
        number, value = constant_scalar(node.inputs[position]), node.inputs[1 - position]
        if number and value is not None:
            return value, (1 / number if node.op_type == "Div" else number)
    return None


def _heads(value: onnx_ir.Value | None, perm: tuple[int, ...], scope: Scope) -> tuple[_Heads | None, float]:
    """What was split into heads and transposed by `perm`, and the constant that it was multiplied with on the way."""
    value, after = _without_factors(value, scope)
    transpose = scope.producer(value, "Transpose")
    if transpose is None:
        return None, after
    moved = ints_attribute(transpose, "perm")
    if moved == _SWAP and perm == _KEYS:
        found, before = _heads(transpose.inputs[0], _HEADS_FIRST, scope)
        return found, after * before
    value, before = _without_factors(transpose.inputs[0], scope)
    return (_split(value, scope) if moved == perm else None), after * before


def _without_factors(value: onnx_ir.Value | None, scope: Scope) -> tuple[onnx_ir.Value | None, float]:
    """(y, c) where the value is y * c, with constants one after the other; c is 1 where there are none."""
    scale = 1.0
    while (node := scope.producer(value, "Mul", "Div")) is not None and (constant := _factor(node)) is not None:
        value, scale = constant[0], scale * constant[1]
    return value, scale


def _split(value: onnx_ir.Value | None, scope: Scope) -> _Heads | None:
    """The [B, T, H * D] before Reshape to [B, T, H, D]; H and D are constants, B and T stay."""
    reshape = scope.producer(value, "Reshape")
    source = None if reshape is None else reshape.inputs[0]
    hidden = extent(source, 2)
    if reshape is None or value is None or source is None or rank(source) != 3 or hidden is None:
        return None
    target = _last_dims(value, reshape, hidden)
    return None if target is None or target[0] * target[1] != hidden else _Heads(source, *target)


def _last_dims(value: onnx_ir.Value, reshape: onnx_ir.Node, hidden: int) -> tuple[int, int] | None:
    """H and D of [B, T, H, D]: from the inferred shape, or from the constants that the target is put together of."""
    heads, size = extent(value, 2), extent(value, 3)
    if rank(value) == 4 and heads is not None and size is not None:
        return heads, size
    numbers = _target(reshape)
    if numbers is None or len(numbers) != 4:
        return None
    heads, size = numbers[2:]
    if heads == -1 and size and size > 0:
        heads = hidden // size
    if size == -1 and heads and heads > 0:
        size = hidden // heads
    return (heads, size) if heads and size and min(heads, size) > 0 else None


def _target(reshape: onnx_ir.Node) -> list[int | None] | None:
    """The target shape of a Reshape, None for entries that are computed."""
    if (array := constant_array(reshape.inputs[1])) is not None:
        return [int(number) for number in array.reshape(-1)]
    concat = reshape.inputs[1].producer() if reshape.inputs[1] is not None else None
    if not is_op(concat, "Concat"):
        return None
    numbers: list[int | None] = []
    for part in concat.inputs:
        array = constant_array(part)
        numbers += [None] if array is None else [int(number) for number in array.reshape(-1)]
    return numbers


def _merged(product: onnx_ir.Node, scope: Scope) -> onnx_ir.Node | None:
    """The Reshape to [B, S, H * D] behind Transpose(0 2 1 3) of the product."""
    transpose = scope.follower(product, "Transpose")
    reshape = None if transpose is None else scope.follower(transpose, "Reshape")
    if transpose is None or reshape is None or ints_attribute(transpose, "perm") != _HEADS_FIRST:
        return None
    merged = rank(reshape.outputs[0]) == 3 or len(_target(reshape) or ()) == 3
    return reshape if merged else None


def _with_rows(
    mask: onnx_ir.Value,
    sequences: tuple[onnx_ir.Value, onnx_ir.Value],
    new: list[onnx_ir.Node],
    like: onnx_ir.Node,
    scope: Scope,
) -> onnx_ir.Value:
    """The operator wants a row for each query; a mask for keys alone, [.., .., 1, L], is expanded.

    `sequences`: queries and keys. Where they are known to be of one length, it is read from the mask, so that all
    layers expand it alike, and once.
    """
    if mask.shape is not None and mask.shape[2] != 1:
        return mask
    graph = graph_of(like)
    ones = scope.constant(graph, np.ones(2, np.int64), "attention_mask_ones")
    one = scope.constant(graph, np.ones(1, np.int64), "attention_mask_one")
    own = _same_length(*sequences) and mask.shape is not None and mask.shape[3] != 1
    shape = scope.make_like(like, "Shape", [mask if own else sequences[0]])
    index = scope.constant(graph, np.array([3 if own else 1], np.int64), "attention_mask_index")
    rows = scope.make_like(like, "Gather", [shape.outputs[0], index])
    target = scope.make_like(like, "Concat", [ones, rows.outputs[0], one], {"axis": 0})
    expanded = scope.make_like(like, "Expand", [mask, target.outputs[0]])
    for number, node in enumerate((shape, rows, target, expanded)):
        node.name = f"{like.name or 'attention'}.mask_{number}"
        node.outputs[0].type = onnx_ir.TensorType(onnx_ir.DataType.INT64) if number < 3 else mask.type
    new += [shape, rows, target, expanded]
    return expanded.outputs[0]


def _same_length(queries: onnx_ir.Value, keys: onnx_ir.Value) -> bool:
    """Whether [B, S, N] and [B, L, N] have S = L, as a number or by the name of the dimension."""
    if queries.shape is None or keys.shape is None:
        return False
    one, other = queries.shape[1], keys.shape[1]
    known = isinstance(one, int) or one.value is not None
    return known and one == other
