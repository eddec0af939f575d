"""What quantized operators compute, as TorchScript source on the floats that quantized tensors stand for.

A source is one function `f`. Its arguments are the operator's own, but for packed weights, in whose place come the
tensors and options that they hold: `w, b`; of a convolution `w, b, stride, padding, dilation, groups`; of a transposed
one `w, b, stride, padding, output_padding, groups, dilation`; of recurrent layers the list of all weights. `LOW` and
`HIGH` are the ends of the grid that results are rounded to.
"""

from __future__ import annotations

from collections.abc import Iterator

# Operator, its first arguments, its value, and its last arguments where that is rounded to a grid ("": where not).
_Row = tuple[str, str, str, str]

_ATEN = "torch.ops.aten."
_GRID = "scale: float, zero: int"
_WEIGHTS = "x: Tensor, w: Tensor, b: Optional[Tensor]"
_CONV = "stride: List[int], padding: List[int], dilation: List[int], groups: int"
_TRANSPOSED = "stride: List[int], padding: List[int], output_padding: List[int], groups: int, dilation: List[int]"
_NORM = "w: Optional[Tensor], b: Optional[Tensor]"
_CELL = "w_ih: Tensor, w_hh: Tensor, b_ih: Tensor, b_hh: Tensor"
_RECURRENT = "biases: bool, layers: int, dropout: float, train: bool, both: bool, batch_first: bool"
_ALL = "biases, layers, dropout, train, both, batch_first"
_POOL = "size: List[int], stride: List[int], padding: List[int], dilation: List[int], ceil: bool"


def _call(name: str, arguments: str) -> str:
    return f"{_ATEN}{name}({arguments})"


def _weighted(suffix: str, activation: str) -> Iterator[_Row]:
    """Dense and convolutional layers; `activation` is "" or the name of one."""

    def active(value: str) -> str:
        return _call(activation, value) if activation else value

    dense = active(_call("linear", "x, w, b"))
    yield f"quantized::linear{suffix}", _WEIGHTS, dense, _GRID
    yield f"quantized::linear{suffix}_dynamic", f"{_WEIGHTS}, reduce: bool", dense, ""
    yield f"quantized::linear{suffix}_dynamic_fp16", _WEIGHTS, dense, ""
    for rank in (1, 2, 3):
        value = _call(f"conv{rank}d", "x, w, b, stride, padding, dilation, groups")
        yield f"quantized::conv{rank}d{suffix}", f"{_WEIGHTS}, {_CONV}", active(value), _GRID
        if rank == 2:
            added = f"x: Tensor, other: Tensor, w: Tensor, b: Optional[Tensor], {_CONV}"
            yield f"quantized::conv2d_add{suffix}", added, active(f"{value} + other"), _GRID
        if not activation:
            yield f"quantized::conv{rank}d_dynamic", f"{_WEIGHTS}, {_CONV}, reduce: bool", value, ""
            value = _call(f"conv_transpose{rank}d", "x, w, b, stride, padding, output_padding, groups, dilation")
            yield f"quantized::conv_transpose{rank}d", f"{_WEIGHTS}, {_TRANSPOSED}", value, _GRID
            dynamic = f"{_WEIGHTS}, {_TRANSPOSED}, reduce: bool"
            yield f"quantized::conv_transpose{rank}d_dynamic", dynamic, value, ""


def _arithmetic(suffix: str, activation: str) -> Iterator[_Row]:
    def active(value: str) -> str:
        return _call(activation, value) if activation else value

    for name, sign in (("add", "+"), ("mul", "*")):
        value = active(f"(a {sign} b)")
        yield f"quantized::{name}{suffix}", "a: Tensor, b: Tensor", value, _GRID
        # A number only moves the grid. "/2": an overload, by the number of its arguments.
        yield f"quantized::{name}_scalar{suffix}", "a: Tensor, b: float", value, ""
        yield f"quantized::{name}{suffix}/2", "a: Tensor, b: float", value, ""
    yield f"quantized::cat{suffix}", "parts: List[Tensor], dim: int", active(_call("cat", "parts, dim")), _GRID
    for norm in ("batch_norm", "batch_norm1d", "batch_norm2d", "batch_norm3d"):
        value = active(_call("batch_norm", "x, w, b, mean, variance, False, 0.0, epsilon, False"))
        arguments = f"x: Tensor, {_NORM}, mean: Tensor, variance: Tensor, epsilon: float"
        yield f"quantized::{norm}{suffix}", arguments, value, _GRID


_OTHERS: tuple[_Row, ...] = (
    ("quantized::linear_leaky_relu", _WEIGHTS, _call("leaky_relu", f"{_call('linear', 'x, w, b')}, slope"),
     f"{_GRID}, slope: float"),
    ("quantized::linear_tanh", _WEIGHTS, _call("tanh", _call("linear", "x, w, b")), _GRID),
    ("quantized::embedding_byte", "w: Tensor, ids: Tensor, pruned: bool", _call("embedding", "w, ids"), ""),
    ("quantized::embedding_4bit", "w: Tensor, ids: Tensor, pruned: bool", _call("embedding", "w, ids"), ""),
    ("quantized::elu", "x: Tensor", _call("elu", "x, a, s, i"), f"{_GRID}, a: float, s: float, i: float"),
    ("quantized::celu", "x: Tensor", _call("celu", "x, a"), f"{_GRID}, a: float"),
    ("quantized::hardswish", "x: Tensor", _call("hardswish", "x"), _GRID),
    ("quantized::sigmoid", "x: Tensor", _call("sigmoid", "x"), _GRID),
    ("quantized::leaky_relu", "x: Tensor, slope: float, inplace: bool", _call("leaky_relu", "x, slope"), _GRID),
    ("quantized::prelu", "x: Tensor, w: Tensor", _call("prelu", "x, w"), _GRID),
    ("quantized::softmax", "x: Tensor, dim: int", _call("softmax", "x, dim"), _GRID),
    ("quantized::matmul", "a: Tensor, b: Tensor", _call("matmul", "a, b"), _GRID),
    ("quantized::relu6", "x: Tensor, inplace: bool", _call("hardtanh", "x, 0.0, 6.0"), ""),
    ("quantized::max_pool2d", f"x: Tensor, {_POOL}", _call("max_pool2d", "x, size, stride, padding, dilation, ceil"),
     ""),
    ("quantized::dropout", "x: Tensor, s: float, z: int, p: float, training: bool", "x", ""),
    ("quantized::layer_norm", f"x: Tensor, shape: List[int], {_NORM}, epsilon: float",
     _call("layer_norm", "x, shape, w, b, epsilon"), _GRID),
    ("quantized::group_norm", f"x: Tensor, groups: int, {_NORM}, epsilon: float",
     _call("group_norm", "x, groups, w, b, epsilon"), _GRID),
    ("quantized::instance_norm", f"x: Tensor, {_NORM}, epsilon: float",
     _call("instance_norm", "x, w, b, None, None, True, 0.0, epsilon, False"), _GRID),
    ("aten::quantize_per_tensor", "x: Tensor", "x", f"{_GRID}, dtype: int"),
    ("aten::quantize_per_tensor_dynamic", "x: Tensor, dtype: int, reduce: bool", "x", ""),
    ("aten::dequantize", "x: Tensor", "x", ""),
    ("prim::is_quantized", "x: Tensor", "True", ""),
    ("aten::quantized_lstm",
     f"x: Tensor, h: List[Tensor], w: List[Tensor], {_RECURRENT}, dtype: Optional[int], dynamic: bool",
     _call("lstm", f"x, h, w, {_ALL}"), ""),
    ("aten::quantized_gru", f"x: Tensor, h: Tensor, w: List[Tensor], {_RECURRENT}", _call("gru", f"x, h, w, {_ALL}"),
     ""),
    ("quantized::quantized_lstm_cell_dynamic", f"x: Tensor, h: List[Tensor], {_CELL}",
     _call("lstm_cell", "x, h, w_ih, w_hh, b_ih, b_hh"), ""),
    *((f"quantized::quantized_{name}_cell_dynamic", f"x: Tensor, h: Tensor, {_CELL}",
       _call(f"{name}_cell", "x, h, w_ih, w_hh, b_ih, b_hh"), "") for name in ("gru", "rnn_tanh", "rnn_relu")),
)  # fmt: skip


def _sources() -> Iterator[tuple[str, str]]:
    rows = list(_OTHERS)
    for suffix, activation in (("", ""), ("_relu", "relu")):
        rows += [*_weighted(suffix, activation), *_arithmetic(suffix, activation)]
    for kind, arguments, value, grid in rows:
        rounded = _call("fake_quantize_per_tensor_affine", f"{value}, scale, zero, LOW, HIGH")
        listed = ", ".join(filter(None, (arguments, grid)))
        yield kind, f"def f({listed}):\n    return {rounded if grid else value}\n"


SOURCES = dict(_sources())
