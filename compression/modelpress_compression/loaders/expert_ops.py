"""Mixtures of experts as transformers writes them: rows sorted by expert, and a product with each expert's weight.

    x [rows, in], w [experts, in, out], ends [experts]
    grouped_mm(x, w, ends)                  rows ends[e - 1] to ends[e] times w[e], for each expert e
    histc(ids, experts, 0, experts - 1)     how many rows each expert has, whose sums are the ends

torch has the product as `aten::_grouped_mm`, transformers as an operator of its own where torch's does not do, which is
defined here while an archive that calls it is read, run and exported. In ONNX it is a Slice and a MatMul for each
expert, so that each row is multiplied once, and the weights are those of so many layers.

Source: transformers/integrations/moe.py, aten/src/ATen/native/GroupedMMUtils.h and cpu/HistogramKernel.cpp.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import onnx_ir
import torch

from modelpress_compression.loaders.foreign_operators import defined

_SCHEMA = "grouped_mm_fallback(Tensor input, Tensor weight, Tensor offs) -> Tensor"
# Experts, and bins of their histogram, that are written out one by one.
MOST = 4096
_INT64, _MATRIX = 7, 2


def expert_operators() -> AbstractContextManager[None]:
    """Defines transformers' operator until the block ends, unless transformers has."""
    return defined("transformers", "grouped_mm_fallback", _define)


def _define(library: Any) -> None:
    library.define(_SCHEMA)
    library.impl("grouped_mm_fallback", grouped_mm, "CPU")
    library.impl("grouped_mm_fallback", _empty, "Meta")


def grouped_mm(rows: torch.Tensor, weight: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    """[rows, out]; zeros for rows behind the last end."""
    result = rows.new_zeros(rows.shape[0], weight.shape[2])
    start = 0
    for expert, end in enumerate(ends.tolist()):
        result[start:end] = rows[start:end] @ weight[expert]
        start = end
    return result


def _empty(rows: torch.Tensor, weight: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    return rows.new_empty(rows.shape[0], weight.shape[2])


def take_products(program: torch.export.ExportedProgram) -> None:
    """Calls transformers' operator in the place of torch's, in place: torch exports its own for bfloat16 alone, which
    becomes float32 here."""
    known: Any = torch.ops.transformers
    for module in program.graph_module.modules():
        if not isinstance(module, torch.fx.GraphModule):
            continue
        for node in module.graph.nodes:
            if node.target is not torch.ops.aten._grouped_mm.default:
                continue
            given = dict(zip(("self", "mat2", "offs", "bias", "out_dtype"), node.args, strict=False)) | node.kwargs
            rows = given["self"].meta.get("val")
            if given.get("offs") is None or given.get("bias") is not None or rows is None or rows.dim() != _MATRIX:
                continue
            node.target = known.grouped_mm_fallback.default
            node.args, node.kwargs = (given["self"], given["mat2"], given["offs"]), {}
        module.recompile()


def translations() -> dict[Callable[..., Any], Callable[..., Any]]:
    """For the exporter of programs: what it has no ONNX for."""
    known: dict[Callable[..., Any], Callable[..., Any]] = {
        torch.ops.aten.histc.default: _histc_to_onnx,
    }
    if hasattr(torch.ops.transformers, "grouped_mm_fallback"):
        known[torch.ops.transformers.grouped_mm_fallback.default] = _fallback_to_onnx
    return known


def _operators() -> Any:
    """onnxscript's, whose types know of numbers in graphs nothing."""
    from onnxscript import opset20

    return opset20


def _fallback_to_onnx(input: Any, weight: Any, offs: Any) -> Any:
    op = _operators()
    if weight.shape[0] > MOST:
        raise NotImplementedError(f"more than {MOST} experts are not supported")
    ends = op.Cast(offs, to=_INT64)
    start, parts = op.Constant(value_ints=[0]), []
    for expert in range(weight.shape[0]):
        place = op.Constant(value_ints=[expert])
        end = op.Gather(ends, place, axis=0)
        rows = op.Slice(input, start, end, op.Constant(value_ints=[0]))
        parts.append(op.MatMul(rows, op.Squeeze(op.Gather(weight, place, axis=0), op.Constant(value_ints=[0]))))
        start = end
    return op.Concat(*parts, axis=0)


def _histc_to_onnx(self: Any, bins: int = 100, min: float = 0.0, max: float = 0.0) -> Any:
    op = _operators()
    if not min < max or bins > MOST:
        raise NotImplementedError(f"aten::histc is not supported without limits, or with more than {MOST} bins")
    values = op.Reshape(op.Cast(self, to=onnx_ir.DataType.FLOAT), op.Constant(value_ints=[1, -1]))
    low, high = (op.Constant(value_float=float(number)) for number in (min, max))
    scale = op.Constant(value_float=bins / (max - min))
    places = op.Floor(op.Mul(op.Sub(values, low), scale))
    # The last bin has its upper limit too.
    places = op.Where(op.Equal(values, high), op.Constant(value_float=float(bins - 1)), places)
    numbers = op.Constant(value_floats=[float(number) for number in range(bins)])
    hits = op.Equal(places, op.Reshape(numbers, op.Constant(value_ints=[-1, 1])))
    counts = op.ReduceSum(op.Cast(hits, to=onnx_ir.DataType.FLOAT), op.Constant(value_ints=[1]), keepdims=0)
    return op.CastLike(counts, self)
