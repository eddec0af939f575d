"""Operators that torch's exporter for TorchScript lacks, or converts too narrowly."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.onnx import symbolic_helper, utils

_OPSET = 18
_TO_BOOL = 9  # onnx.TensorProto.BOOL


@contextlib.contextmanager
def extra_symbolics() -> Iterator[None]:
    """Registers them for the time of one export."""
    for name, symbolic in _SYMBOLICS.items():
        utils.register_custom_op_symbolic(name, symbolic, _OPSET)
    log = torch._C._jit_onnx_log
    # The exporter prints whole graphs when it fails, whatever its own switch says.
    torch._C._jit_onnx_log = _silent
    try:
        yield
    finally:
        torch._C._jit_onnx_log = log
        for name in _SYMBOLICS:
            utils.unregister_custom_op_symbolic(name, _OPSET)


def _silent(*_: object) -> None:
    """Takes the place of a log."""


def _not(g: Any, value: Any) -> Any:
    """Python's `not`: of a number, too."""
    return g.op("Not", g.op("Cast", value, to_i=_TO_BOOL))


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


# "__not_": the exporter cuts a last underscore off, for it marks operators that work in place.
_SYMBOLICS: dict[str, Callable[..., Any]] = {"aten::__not_": _not, "aten::lstm_cell": _lstm_cell}
