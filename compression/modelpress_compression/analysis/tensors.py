"""Putting other numbers in the place of a constant."""

from __future__ import annotations

import numpy as np
import onnx_ir

from modelpress_compression.analysis.graph import constant_tensor, is_op
from modelpress_compression.inputs import Array


def replace_numbers(value: onnx_ir.Value, array: Array) -> None:
    """Gives a constant these numbers, in the element type that it has, be it an initializer or of a Constant node."""
    old = constant_tensor(value)
    if old is None:
        raise TypeError(f"value {value.name!r} is not constant")
    tensor = onnx_ir.Tensor(np.ascontiguousarray(array, dtype=old.dtype.numpy()), dtype=old.dtype, name=old.name)
    producer = value.producer()
    if producer is not None and is_op(producer, "Constant"):
        producer.attributes["value"] = onnx_ir.AttrTensor("value", tensor)
    value.const_value = tensor
