"""Products of quantized integers, as exact sums of doubles: torch has no fast integer convolution."""

from __future__ import annotations

from collections.abc import Callable

import torch
from onnx_ir import DataType
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from modelpress_compression.executor.dtypes import torch_type
from modelpress_compression.executor.ops.convolution import convolution
from modelpress_compression.executor.ops.quantization import dynamic_parameters, quantized, spread
from modelpress_compression.executor.registry import Function, operator
from modelpress_compression.executor.site import Site
from modelpress_compression.graph.read import MICROSOFT


def centred(x: Tensor, zero_point: Tensor | None, axis: int) -> Tensor:
    """x - zero point as doubles; a vector of zero points runs along the axis."""
    values = x.to(torch.float64)
    return values if zero_point is None else values - _along(zero_point, values, axis)


def _along(value: Tensor, x: Tensor, axis: int) -> Tensor:
    value = value.to(torch.float64)
    return value if value.dim() > 1 else spread(value, x, axis, 0)


@operator("MatMulInteger")
def matmul_integer(site: Site) -> Function:
    """Zero points for each row of a and each column of b."""

    def run(a: Tensor, b: Tensor, a_zero: Tensor | None = None, b_zero: Tensor | None = None) -> Tensor:
        return (centred(a, a_zero, -2) @ centred(b, b_zero, -1)).to(torch.int32)

    return run


@operator("ConvInteger")
def conv_integer(site: Site) -> Function:
    conv = convolution(site)

    def run(x: Tensor, weight: Tensor, x_zero: Tensor | None = None, weight_zero: Tensor | None = None) -> Tensor:
        result: Tensor = conv(centred(x, x_zero, 1), centred(weight, weight_zero, 0))
        return result.to(torch.int32)

    return run


def _real(x: Tensor, scale: Tensor, zero_point: Tensor | None, axis: int) -> Tensor:
    return centred(x, zero_point, axis) * _along(scale, x, axis)


def _stored(y: Tensor, scale: Tensor, zero_point: Tensor | None, dtype: DataType, axis: int) -> Tensor:
    zero = None if zero_point is None else _along(zero_point, y, axis)
    return quantized(y, _along(scale, y, axis), zero, dtype).to(torch_type(dtype))


def _type(site: Site, index: int) -> DataType:
    return site.dtype(index) or site.dtype(0) or DataType.UINT8


@operator("QLinearMatMul")
def qlinear_matmul(site: Site) -> Function:
    dtype = _type(site, 7)

    def run(
        a: Tensor, a_scale: Tensor, a_zero: Tensor, b: Tensor, b_scale: Tensor, b_zero: Tensor, scale: Tensor,
        zero: Tensor,
    ) -> Tensor:  # fmt: skip
        return _stored(_real(a, a_scale, a_zero, -2) @ _real(b, b_scale, b_zero, -1), scale, zero, dtype, -2)

    return run


@operator("QLinearConv")
def qlinear_conv(site: Site) -> Function:
    conv, dtype = convolution(site), _type(site, 7)

    def run(
        x: Tensor, x_scale: Tensor, x_zero: Tensor, w: Tensor, w_scale: Tensor, w_zero: Tensor, scale: Tensor,
        zero: Tensor, bias: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        y = conv(centred(x, x_zero, 1), centred(w, w_zero, 0))
        if bias is not None:
            y = y + bias.to(torch.float64).reshape(-1, *([1] * (y.dim() - 2)))
        product = x_scale.to(torch.float64) * w_scale.to(torch.float64)
        return _stored(y * _along(product, y, 1), scale, zero, dtype, 1)

    return run


@operator("QGemm", domain=MICROSOFT)
def qgemm(site: Site) -> Function:
    """Without an output scale the result is float."""
    alpha, trans_a, trans_b = site.number("alpha", 1.0), site.flag("transA"), site.flag("transB")
    dtype = _type(site, 8)

    def run(
        a: Tensor, a_scale: Tensor, a_zero: Tensor, b: Tensor, b_scale: Tensor, b_zero: Tensor,
        c: Tensor | None = None, scale: Tensor | None = None, zero: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        left = centred(a, a_zero, 0)
        right = centred(b, b_zero, 0 if trans_b else 1)
        y = (left.t() if trans_a else left) @ (right.t() if trans_b else right)
        y = y if c is None else y + c.to(torch.float64)
        y = alpha * y * (a_scale.to(torch.float64) * b_scale.to(torch.float64))
        return y.to(torch.float32) if scale is None else _stored(y, scale, zero, dtype, 1)

    return run


@operator("MatMulIntegerToFloat", domain=MICROSOFT)
def matmul_integer_to_float(site: Site) -> Function:
    def run(
        a: Tensor, b: Tensor, a_scale: Tensor, b_scale: Tensor, a_zero: Tensor | None = None,
        b_zero: Tensor | None = None, bias: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        y = (centred(a, a_zero, -2) @ centred(b, b_zero, -1)) * (a_scale.to(torch.float64) * b_scale)
        y = y.to(a_scale.dtype)
        return y if bias is None else y + bias

    return run


@operator("DynamicQuantizeMatMul", domain=MICROSOFT)
def dynamic_quantize_matmul(site: Site) -> Function:
    def run(a: Tensor, b: Tensor, b_scale: Tensor, b_zero: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
        scale, zero = dynamic_parameters(a)
        q = (torch.round(a / scale) + zero).clamp(0, 255)
        y = ((q - zero).to(torch.float64) @ centred(b, b_zero, -1)) * (scale.to(torch.float64) * b_scale)
        y = y.to(a.dtype)
        return y if bias is None else y + bias

    return run


_FLOAT_FUNCTIONS: dict[str, Callable[[Site], Callable[..., Tensor]]] = {
    "QLinearSigmoid": lambda site: torch.sigmoid,
    "QLinearLeakyRelu": lambda site: lambda x: F.leaky_relu(x, site.number("alpha", 0.01)),
    "QLinearSoftmax": lambda site: lambda x: torch.softmax(x, site.integer("axis", -1)),
    "QLinearGlobalAveragePool": lambda site: lambda x: x.mean(tuple(range(2, x.dim())), keepdim=True),
}


@operator(*_FLOAT_FUNCTIONS, domain=MICROSOFT)
def qlinear_unary(site: Site) -> Function:
    """Dequantized, computed, quantized again."""
    function, dtype = _FLOAT_FUNCTIONS[site.node.op_type](site), _type(site, 4)

    def run(x: Tensor, x_scale: Tensor, x_zero: Tensor | None, scale: Tensor, zero: Tensor | None = None) -> Tensor:
        return _stored(function(_real(x, x_scale, x_zero, 1)), scale, zero, dtype, 1)

    return run


@operator("QLinearAdd", "QLinearMul", domain=MICROSOFT)
def qlinear_binary(site: Site) -> Function:
    function = torch.add if site.node.op_type == "QLinearAdd" else torch.mul
    dtype = _type(site, 7)

    def run(
        a: Tensor, a_scale: Tensor, a_zero: Tensor | None, b: Tensor, b_scale: Tensor, b_zero: Tensor | None,
        scale: Tensor, zero: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        return _stored(function(_real(a, a_scale, a_zero, 1), _real(b, b_scale, b_zero, 1)), scale, zero, dtype, 1)

    return run


@operator("QLinearConcat", domain=MICROSOFT)
def qlinear_concat(site: Site) -> Function:
    """y scale, y zero point, then (tensor, scale, zero point) for each part."""
    axis, dtype = site.integer("axis", 0), _type(site, 1)

    def run(scale: Tensor, zero: Tensor, *parts: Tensor) -> Tensor:
        values = [_real(parts[i], parts[i + 1], parts[i + 2], 1) for i in range(0, len(parts), 3)]
        return _stored(torch.cat(values, axis), scale, zero, dtype, 1)

    return run
