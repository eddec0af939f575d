"""One node as its builder sees it: attributes, constant inputs, element types, subgraphs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NoReturn

import onnx_ir
import torch
from onnx_ir import DataType
from torch import Tensor

from modelpress_compression.errors import UnsupportedOperatorError
from modelpress_compression.executor.dtypes import tensor_of, torch_type
from modelpress_compression.graph.read import (
    constant_tensor,
    float_attribute,
    int_attribute,
    label,
    string_attribute,
)

if TYPE_CHECKING:
    from modelpress_compression.executor.plan import ExecutionPlan

IntsReader = Callable[..., tuple[int, ...]]


class NotExecutableError(UnsupportedOperatorError):
    """The executor has no implementation of an operator, of its version, or of the form that a node has."""

    def __init__(self, op_type: str, domain: str, version: int, node: str, detail: str = "") -> None:
        name = f"{domain or 'ai.onnx'}.{op_type}"
        why = detail or "it has no implementation of this operator"
        super().__init__(
            f"Node {node!r}: the differentiable executor cannot run {name} of opset {version}: {why}. "
            f"Use a step that does not train, or export the model with another opset.",
            op_type=op_type,
            domain=domain or "ai.onnx",
            version=str(version),
            node=node,
        )


class Site:
    """A node while it is compiled. `version` is that of its domain's operator set."""

    def __init__(
        self,
        node: onnx_ir.Node,
        version: int,
        constants: Mapping[onnx_ir.Value, Any],
        subplans: Mapping[str, ExecutionPlan],
        device: torch.device,
        *,
        keeps_gradient: bool = False,
    ) -> None:
        self.node, self.version, self.device = node, version, device
        self.subplans = subplans
        # QuantizeLinear: all that follows dequantizes, so that its integers may be carried as floats with gradients.
        self.keeps_gradient = keeps_gradient
        # Inputs that are read as numbers: they need not travel to the device.
        self.host_inputs: set[int] = set()
        self._constants = constants

    def has(self, index: int) -> bool:
        """Whether input `index` is given."""
        return index < len(self.node.inputs) and self.node.inputs[index] is not None

    @property
    def outputs(self) -> int:
        """How many outputs are wanted, counted to the last that has a name."""
        return max((index + 1 for index, value in enumerate(self.node.outputs) if value.name), default=0)

    def constant(self, index: int) -> Any:
        """The value of an input that never changes; None for any other."""
        if not self.has(index):
            return None
        value = self.node.inputs[index]
        return None if value is None else self._constants.get(value)

    def dtype(self, index: int) -> DataType | None:
        """Element type of an input, where the graph tells it."""
        value = self.node.inputs[index] if self.has(index) else None
        if value is None:
            return None
        tensor = constant_tensor(value)
        return value.dtype if tensor is None else tensor.dtype

    def output_dtype(self, index: int = 0) -> DataType | None:
        """Element type of an output, where the graph tells it."""
        return self.node.outputs[index].dtype

    def integer(self, name: str, default: int) -> int:
        return int_attribute(self.node, name, default)

    def flag(self, name: str, default: bool = False) -> bool:
        return bool(int_attribute(self.node, name, default))

    def number(self, name: str, default: float) -> float:
        return float_attribute(self.node, name, default)

    def string(self, name: str, default: str) -> str:
        return string_attribute(self.node, name, default)

    def ints(self, name: str, default: Sequence[int] | None = None) -> tuple[int, ...] | None:
        attribute = self.node.attributes.get(name)
        if attribute is None:
            return None if default is None else tuple(default)
        return tuple(int(number) for number in attribute.as_ints())

    def floats(self, name: str) -> tuple[float, ...] | None:
        attribute = self.node.attributes.get(name)
        return None if attribute is None else tuple(float(number) for number in attribute.as_floats())

    def strings(self, name: str) -> tuple[str, ...] | None:
        attribute = self.node.attributes.get(name)
        return None if attribute is None else tuple(attribute.as_strings())

    def tensor(self, name: str) -> Any:
        attribute = self.node.attributes.get(name)
        return None if attribute is None else tensor_of(attribute.as_tensor(), self.device)

    def torch_type(self, name: str, default: torch.dtype | None = None) -> torch.dtype | None:
        """An attribute that holds an ONNX element type."""
        attribute = self.node.attributes.get(name)
        return default if attribute is None else torch_type(DataType(attribute.as_int()))

    def reader(self, index: int, name: str = "") -> IntsReader:
        """Reads integers from input `index`, or from attribute `name` of older versions; the function takes the node's
        inputs. Constants are read once. () where neither is given."""
        fixed = self.ints(name) if name else None
        if fixed is None and not self.has(index):
            fixed = ()
        if fixed is None and isinstance(constant := self.constant(index), Tensor):
            fixed = tuple(int(number) for number in constant.reshape(-1).tolist())
        if fixed is not None:
            known = fixed
            self.host_inputs.add(index)
            return lambda *inputs: known
        self.host_inputs.add(index)
        return lambda *inputs: tuple(map(int, inputs[index].reshape(-1).tolist()))

    def refuse(self, detail: str) -> NoReturn:
        """Raises the error for a form of the operator that is not supported."""
        raise NotExecutableError(self.node.op_type, self.node.domain, self.version, label(self.node), detail)
