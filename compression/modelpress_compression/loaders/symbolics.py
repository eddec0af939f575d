"""Operators that torch.onnx's exporter for TorchScript lacks, or converts too narrowly, in terms of ONNX.

- Attention as `nn.MultiheadAttention` and `nn.TransformerEncoderLayer` compute it in evaluation mode, in one operator:

      q, k, v = x W^T + b   [batch, tokens, 3 * embed] -> three of [batch, heads, tokens, embed / heads]
      y = softmax(q k^T / sqrt(embed / heads)) v

  Nested tensors, which leave padding out, are the padded ones with zeros at the padding: `Where(keep, x, 0)`, where
  `keep` [batch, tokens, 1] says what is no padding. Whoever takes such a tensor finds `keep` there.
- torchvision's `nms` and `roi_align`, which are ONNX's NonMaxSuppression and RoiAlign.
- Products with the weights of experts, and the histogram that says how many rows each of them has (`expert_ops`).
- An LSTM's cell, an axis made into several, and `not` of a number.
- Resizing to sizes that are computed: the exporter loses how many axes there are, which what follows may need.

Each function gets the exporter's graph context `g` and the operator's arguments.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch.onnx import symbolic_helper

from modelpress_compression.loaders.expert_ops import MOST

_FLOAT, _INT64, _BOOL = 1, 7, 9  # of onnx.TensorProto
_LOWEST = torch.finfo(torch.float32).min  # rather than -inf: a row that sees nothing is no NaN
_KEY_PADDING = 1  # a mask_type: [batch, keys]; 0 is [queries, keys], 2 is [batch, heads, queries, keys]


def _number(value: Any, kind: Literal["i", "f"] = "i") -> Any:
    """A Python number of an argument: `i` integer or flag, `f` float."""
    return symbolic_helper._maybe_get_const(value, kind)


def _given(value: Any) -> bool:
    return value is not None and not symbolic_helper._is_none(value)


def _constant(g: Any, value: Any, dtype: torch.dtype = torch.int64) -> Any:
    return g.op("Constant", value_t=torch.tensor(value, dtype=dtype))


def _nested(g: Any, tensor: Any, mask: Any, _check: Any = None) -> Any:
    """[batch, tokens, embed] and what to keep [batch, tokens], as one value."""
    keep = g.op("Unsqueeze", g.op("Cast", mask, to_i=_BOOL), _constant(g, [2]))
    return g.op("Where", keep, tensor, _constant(g, 0.0, torch.float32))


def _keep_of(value: Any) -> Any:
    """What is no padding [batch, tokens, 1] of a nested tensor; None of another."""
    node = value.node()
    return next(iter(node.inputs())) if node.kind() == "onnx::Where" else None


def _padded(g: Any, tensor: Any, padding: Any, _size: Any = None) -> Any:
    keep = _keep_of(tensor)
    if keep is None or _number(padding, "f") == 0.0:
        return tensor
    return g.op("Where", keep, tensor, _constant(g, _number(padding, "f"), torch.float32))


def _heads(g: Any, value: Any, embed: int, heads: int) -> Any:
    """[batch, tokens, embed] -> [batch, heads, tokens, embed / heads]."""
    split = g.op("Reshape", value, _constant(g, [0, -1, heads, embed // heads]))
    return g.op("Transpose", split, perm_i=[0, 2, 1, 3])


def _projections(g: Any, inputs: tuple[Any, Any, Any], weight: Any, bias: Any) -> tuple[Any, Any, Any]:
    """Query, key and value; one product where all are made of the same tensor."""
    if len({value.debugName() for value in inputs}) == 1:
        q, k, v = g.op("Split", _linear(g, inputs[0], weight, bias), axis_i=2, num_outputs_i=3, outputs=3)
        return q, k, v
    weights = g.op("Split", weight, axis_i=0, num_outputs_i=3, outputs=3)
    biases = g.op("Split", bias, axis_i=0, num_outputs_i=3, outputs=3)
    q, k, v = (_linear(g, *parts) for parts in zip(inputs, weights, biases, strict=True))
    return q, k, v


def _hidden_keys(g: Any, mask: Any, mask_type: Any, keep: Any) -> Any:
    """True where a query must not look, in a shape that goes with [batch, heads, queries, keys]; None: nowhere."""
    if _given(mask):
        hidden = g.op("Cast", mask, to_i=_BOOL)
        by_key = _given(mask_type) and _number(mask_type) == _KEY_PADDING
        return g.op("Unsqueeze", hidden, _constant(g, [1, 2])) if by_key else hidden
    if keep is None:
        return None
    return g.op("Not", g.op("Unsqueeze", g.op("Transpose", keep, perm_i=[0, 2, 1]), _constant(g, [1])))


def _attention(
    g: Any, query: Any, key: Any, value: Any, embed: Any, heads: Any, qkv_weight: Any, qkv_bias: Any,
    weight: Any, bias: Any, mask: Any = None, need_weights: Any = None, average: Any = None, mask_type: Any = None,
) -> tuple[Any, Any]:  # fmt: skip
    """aten::_native_multi_head_attention: the result, and how much each query looked at each key."""
    width, count = _number(embed), _number(heads)
    projected = _projections(g, (query, key, value), qkv_weight, qkv_bias)
    q, k, v = (_heads(g, part, width, count) for part in projected)
    scale = _constant(g, 1.0 / math.sqrt(width // count), torch.float32)
    scores = g.op("MatMul", g.op("Mul", q, scale), g.op("Transpose", k, perm_i=[0, 1, 3, 2]))
    hidden = _hidden_keys(g, mask, mask_type, _keep_of(query))
    if hidden is not None:
        scores = g.op("Where", hidden, _constant(g, _LOWEST, torch.float32), scores)
    looks = g.op("Softmax", scores, axis_i=-1)
    joined = g.op("Transpose", g.op("MatMul", looks, v), perm_i=[0, 2, 1, 3])
    result = _linear(g, g.op("Reshape", joined, _constant(g, [0, -1, width])), weight, bias)
    if _given(average) and _number(average):
        looks = g.op("ReduceMean", looks, _constant(g, [1]), keepdims_i=0)
    return result, looks


def _encoder_layer(
    g: Any, source: Any, embed: Any, heads: Any, qkv_weight: Any, qkv_bias: Any, weight: Any, bias: Any,
    use_gelu: Any, norm_first: Any, epsilon: Any, norm_1: Any, norm_bias_1: Any, norm_2: Any, norm_bias_2: Any,
    weight_1: Any, bias_1: Any, weight_2: Any, bias_2: Any, mask: Any = None, mask_type: Any = None,
) -> Any:  # fmt: skip
    """aten::_transformer_encoder_layer_fwd: attention and two dense layers, each with its norm and its shortcut."""

    def norm(value: Any, scale: Any, shift: Any) -> Any:
        return g.op("LayerNormalization", value, scale, shift, axis_i=-1, epsilon_f=_number(epsilon, "f"))

    def attend(value: Any) -> Any:
        # The mask of a nested tensor goes on with what is made of it.
        inner = value if keep is None else _again_nested(g, value, keep)
        return _attention(
            g, inner, inner, inner, embed, heads, qkv_weight, qkv_bias, weight, bias, mask, mask_type=mask_type
        )[0]

    def dense(value: Any) -> Any:
        inner = _linear(g, value, weight_1, bias_1)
        return _linear(g, _gelu(g, inner) if _number(use_gelu) else g.op("Relu", inner), weight_2, bias_2)

    keep = _keep_of(source)
    if _number(norm_first):
        middle = g.op("Add", source, attend(norm(source, norm_1, norm_bias_1)))
        result = g.op("Add", middle, dense(norm(middle, norm_2, norm_bias_2)))
    else:
        middle = norm(g.op("Add", source, attend(source)), norm_1, norm_bias_1)
        result = norm(g.op("Add", middle, dense(middle)), norm_2, norm_bias_2)
    return result if keep is None else _again_nested(g, result, keep)


def _again_nested(g: Any, value: Any, keep: Any) -> Any:
    return g.op("Where", keep, value, _constant(g, 0.0, torch.float32))


def _gelu(g: Any, value: Any) -> Any:
    """x/2 (1 + erf(x / sqrt(2)))."""
    erf = g.op("Erf", g.op("Mul", value, _constant(g, math.sqrt(0.5), torch.float32)))
    half = g.op("Mul", value, _constant(g, 0.5, torch.float32))
    return g.op("Mul", half, g.op("Add", erf, _constant(g, 1.0, torch.float32)))


def _nms(g: Any, boxes: Any, scores: Any, threshold: Any) -> Any:
    """torchvision::nms: boxes [n, 4], scores [n] -> what is kept, best first [k]."""
    found = g.op(
        "NonMaxSuppression",
        g.op("Unsqueeze", g.op("Cast", boxes, to_i=_FLOAT), _constant(g, [0])),
        g.op("Unsqueeze", g.op("Cast", scores, to_i=_FLOAT), _constant(g, [0, 1])),
        _constant(g, [torch.iinfo(torch.int64).max]),
        _constant(g, [_number(threshold, "f")], torch.float32),
    )
    return g.op("Squeeze", g.op("Gather", found, _constant(g, [2]), axis_i=1), _constant(g, [1]))


def _roi_align(
    g: Any, features: Any, rois: Any, scale: Any, height: Any, width: Any, sampling: Any, aligned: Any
) -> Any:
    """torchvision::roi_align: features [n, c, h, w], rois [k, 5] (image, x1, y1, x2, y2) -> [k, c, height, width]."""
    image = g.op("Squeeze", g.op("Gather", rois, _constant(g, [0]), axis_i=1), _constant(g, [1]))
    return g.op(
        "RoiAlign",
        features,
        g.op("Gather", rois, _constant(g, [1, 2, 3, 4]), axis_i=1),
        g.op("Cast", image, to_i=_INT64),
        coordinate_transformation_mode_s="half_pixel" if _number(aligned) else "output_half_pixel",
        spatial_scale_f=_number(scale, "f"),
        output_height_i=_number(height),
        output_width_i=_number(width),
        sampling_ratio_i=max(0, _number(sampling)),  # as many as the region needs: -1 there, 0 here
    )


def _not(g: Any, value: Any) -> Any:
    """Python's `not`: of a number, too."""
    return g.op("Not", g.op("Cast", value, to_i=_BOOL))


def _unflatten(g: Any, value: Any, dim: Any, sizes: Any) -> Any:
    """One axis into several. The exporter's own result has no known rank, which what follows needs."""
    rank = symbolic_helper._get_tensor_rank(value) or 0
    axis = _number(dim) % rank
    given = symbolic_helper._maybe_get_const(sizes, "is")
    inner = given if isinstance(given, list) else symbolic_helper._unpack_list(sizes)
    shape = g.op("Shape", value)
    behind = [g.op("Gather", shape, _constant(g, [index]), axis_i=0) for index in range(axis + 1, rank)]
    middle = [
        _constant(g, [size]) if isinstance(size, int) else g.op("Reshape", size, _constant(g, [1])) for size in inner
    ]
    before = [_constant(g, [0]) for _ in range(axis)]  # as it is
    result = g.op("Reshape", value, g.op("Concat", *before, *middle, *behind, axis_i=0))
    result.setType(value.type().with_sizes([None] * (rank - 1 + len(inner))))
    return result


def _resize(name: str, rank: int, mode: str) -> Callable[..., Any]:
    own = symbolic_helper._interpolate_helper(  # type: ignore[no-untyped-call]
        f"upsample_{name}", rank, mode
    )

    def symbolic(g: Any, value: Any, *arguments: Any) -> Any:
        result = own(g, value, *arguments)
        if symbolic_helper._get_tensor_rank(result) is None:
            result.setType(value.type().with_sizes([None] * rank))
        return result

    return symbolic


def _lstm_cell(g: Any, value: Any, state: Any, w_ih: Any, w_hh: Any, b_ih: Any = None, b_hh: Any = None) -> Any:
    """One step: gates [batch, 4 * hidden] in torch's order input, forget, cell, output."""
    hidden, cell = symbolic_helper._unpack_list(state)
    gates = g.op(
        "Add",
        _linear(g, value, w_ih, b_ih),
        _linear(g, hidden, w_hh, b_hh),
    )
    i, f, c, o = g.op("Split", gates, axis_i=1, num_outputs_i=4, outputs=4)
    new_cell = g.op(
        "Add",
        g.op("Mul", g.op("Sigmoid", f), cell),
        g.op("Mul", g.op("Sigmoid", i), g.op("Tanh", c)),
    )
    return g.op("Mul", g.op("Sigmoid", o), g.op("Tanh", new_cell)), new_cell


def _linear(g: Any, value: Any, weight: Any, bias: Any) -> Any:
    product = g.op("MatMul", value, g.op("Transpose", weight, perm_i=[1, 0]))
    return product if bias is None or symbolic_helper._is_none(bias) else g.op("Add", product, bias)


def _histc(g: Any, value: Any, bins: Any, low: Any, high: Any) -> Any:
    """How many numbers lie in each of `bins` equal parts of `low` to `high`, which belongs to the last."""
    count, start, stop = _number(bins), float(_number(low, "f")), float(_number(high, "f"))
    if not start < stop or count > MOST:
        return symbolic_helper._unimplemented("aten::histc", f"no limits, or more than {MOST} bins")
    values = g.op("Reshape", g.op("Cast", value, to_i=_FLOAT), _constant(g, [1, -1]))
    scaled = g.op(
        "Mul",
        g.op("Sub", values, _constant(g, start, torch.float32)),
        _constant(g, count / (stop - start), torch.float32),
    )
    last = g.op("Equal", values, _constant(g, stop, torch.float32))
    places = g.op("Where", last, _constant(g, float(count - 1), torch.float32), g.op("Floor", scaled))
    numbers = _constant(g, [[float(number)] for number in range(count)], torch.float32)
    hits = g.op("Cast", g.op("Equal", places, numbers), to_i=_FLOAT)
    return g.op("CastLike", g.op("ReduceSum", hits, _constant(g, [1]), keepdims_i=0), value)


def _grouped_mm(g: Any, rows: Any, weight: Any, ends: Any = None, bias: Any = None, dtype: Any = None) -> Any:
    """rows [n, in], weight [experts, in, out], ends [experts] -> [n, out]; see `expert_ops`."""
    experts = symbolic_helper._get_tensor_dim_size(weight, 0)
    ordered = _given(ends) and not _given(bias) and symbolic_helper._get_tensor_rank(rows) in (2, None)
    if experts is None or experts > MOST or not ordered:
        return symbolic_helper._unimplemented("aten::_grouped_mm", "groups of another kind than rows in order")
    ends = g.op("Cast", ends, to_i=_INT64)
    start, parts = _constant(g, [0]), []
    for expert in range(experts):
        place = _constant(g, [expert])
        end = g.op("Gather", ends, place, axis_i=0)
        part = g.op("Slice", rows, start, end, _constant(g, [0]))
        own = g.op("Squeeze", g.op("Gather", weight, place, axis_i=0), _constant(g, [0]))
        parts.append(g.op("MatMul", part, own))
        start = end
    return g.op("Concat", *parts, axis_i=0)


_RESIZED = (
    ("nearest1d", 3, "nearest"), ("nearest2d", 4, "nearest"), ("nearest3d", 5, "nearest"),
    ("linear1d", 3, "linear"), ("bilinear2d", 4, "linear"), ("trilinear3d", 5, "linear"), ("bicubic2d", 4, "cubic"),
)  # fmt: skip
# "__not_": the exporter cuts a last underscore off, for it marks operators that work in place.
SYMBOLICS: dict[str, Callable[..., Any]] = {
    "aten::__not_": _not,
    "aten::histc": _histc,
    "aten::lstm_cell": _lstm_cell,
    "aten::unflatten": _unflatten,
    "aten::_grouped_mm": _grouped_mm,
    "aten::_native_multi_head_attention": _attention,
    "aten::_transformer_encoder_layer_fwd": _encoder_layer,
    "aten::_nested_tensor_from_mask": _nested,
    "aten::to_padded_tensor": _padded,
    "torchvision::nms": _nms,
    "torchvision::roi_align": _roi_align,
    **{f"aten::upsample_{name}": _resize(name, rank, mode) for name, rank, mode in _RESIZED},
}
