"""What is put around an operator's function: unsigned integers in signed types, inputs on the same device."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from modelpress_compression.executor.dtypes import SIGNED, UNSIGNED, torch_type
from modelpress_compression.executor.registry import Function, Operator
from modelpress_compression.executor.site import Site


def for_types(function: Function, entry: Operator, site: Site) -> Function:
    """Around functions of unsigned 16 to 64 bit integers: computed in a signed type, returned in their own."""
    node = site.node
    wanted = [site.output_dtype(index) for index in range(len(node.outputs))]
    types = {*(site.dtype(index) for index in range(len(node.inputs))), *wanted}
    if entry.carries_unsigned or not types & UNSIGNED:
        return function
    targets = [torch_type(dtype) if dtype in UNSIGNED and dtype is not None else None for dtype in wanted]

    def signed(*inputs: Any) -> Any:
        result = function(*(_signed(value) for value in inputs))
        results = result if isinstance(result, tuple) else (result,)
        results = tuple(
            value if target is None else value.to(target) for value, target in zip(results, targets, strict=False)
        )
        return results if isinstance(result, tuple) else results[0]

    return signed


def _signed(value: Any) -> Any:
    return value.to(SIGNED[value.dtype]) if isinstance(value, Tensor) and value.dtype in SIGNED else value


def on_device(function: Function, host_inputs: frozenset[int], device: torch.device) -> Callable[..., Any]:
    """Around functions on an accelerator: shape arithmetic stays with the CPU until it meets values of the device."""

    def placed(*inputs: Any) -> Any:
        operands = [value for index, value in enumerate(inputs) if index not in host_inputs]
        if any(isinstance(value, Tensor) and value.device.type == device.type for value in operands):
            inputs = tuple(
                value.to(device)
                if isinstance(value, Tensor) and value.device.type == "cpu" and index not in host_inputs
                else value
                for index, value in enumerate(inputs)
            )
        return function(*inputs)

    return placed
