"""From a graph to a plan: the nodes that the outputs need, with constants bound and all that depends on them alone
computed."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, NamedTuple

import onnx_ir
import torch
from torch import Tensor

from modelpress_compression.errors import ModelNotRunnableError
from modelpress_compression.executor.dtypes import SIGNED, UNSIGNED, tensor_of, torch_type
from modelpress_compression.executor.fusion import Fused, fake_quantization, gated_activations, in_place, may_overwrite
from modelpress_compression.executor.plan import MISSING, UNWANTED, ExecutionPlan, ExecutionStep, freed_after
from modelpress_compression.executor.registry import Function, Operator, find, opset_version
from modelpress_compression.executor.site import NotExecutableError, Site
from modelpress_compression.graph.read import constant_tensor, is_op, label, only_consumer
from modelpress_compression.graph.subgraphs import captured_values, subgraphs

# A folded constant may be this many times as large as the constants behind it: 4-bit weights become float32.
_FOLD_GROWTH = 8
_FOLD_ALWAYS_BYTES = 64 * 1024  # 64 KiB
# Integer constants up to this size stay on the CPU: shapes, axes, indices.
_HOST_ELEMENTS = 64
# Through these, quantized integers reach a DequantizeLinear unchanged.
_CARRIERS = frozenset(
    ("Identity", "Reshape", "Transpose", "Squeeze", "Unsqueeze", "Flatten", "Slice", "Expand", "Tile", "Split")
)


class Compiler:
    """Compiles one model's graphs; constants are loaded once.

    `parameters`: constants that are trained; `given`: values that come from outside, whatever they are in the graph.
    """

    def __init__(
        self,
        opsets: Mapping[str, int],
        parameters: Mapping[onnx_ir.Value, Tensor],
        given: Collection[onnx_ir.Value],
        device: torch.device,
    ) -> None:
        self.opsets, self.device = opsets, device
        self.parameters, self.given = parameters, frozenset(given)
        self.constants: dict[onnx_ir.Value, Any] = {}

    def compile(
        self, nodes: Sequence[onnx_ir.Node], inputs: Sequence[onnx_ir.Value], outputs: Sequence[onnx_ir.Value]
    ) -> ExecutionPlan:
        """A plan of these nodes (in topological order). Raises NotExecutableError."""
        return _Assembly(self, inputs, outputs).assemble(nodes)

    def load(self, value: onnx_ir.Value) -> bool:
        """Whether the value is a constant that is not trained; if so it is in `constants` from now on."""
        if value in self.constants:
            return True
        if value in self.parameters or value in self.given:
            return False
        tensor = constant_tensor(value)
        if tensor is None and value.is_initializer():
            tensor = value.const_value  # a default that callers may override, and here did not
        if tensor is None:
            return False
        keep = tensor.dtype.is_integer() and tensor.size <= _HOST_ELEMENTS
        self.constants[value] = laid_out(value, tensor_of(tensor, "cpu" if keep else self.device))
        return True

    def entry(self, node: onnx_ir.Node) -> Operator:
        """The implementation of the node's operator. Raises NotExecutableError."""
        version = opset_version(node, self.opsets)
        found = find(node.domain, node.op_type, version)
        if found is None:
            raise NotExecutableError(node.op_type, node.domain, version, label(node))
        return found


class _Planned(NamedTuple):
    """A step whose `frees` are not known yet."""

    function: Function
    in_place: Function | None
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    label: str


class _Assembly:
    """One plan in the making."""

    def __init__(self, compiler: Compiler, inputs: Sequence[onnx_ir.Value], outputs: Sequence[onnx_ir.Value]) -> None:
        self.compiler, self.outputs = compiler, outputs
        self.template: list[Any] = [None, None]
        self.slots: dict[onnx_ir.Value, int] = {}
        self.steps: list[_Planned] = []
        self.fused: dict[onnx_ir.Node, Fused] = {}
        self.given = frozenset(inputs)
        self.inputs = tuple(self._new(value) for value in inputs)

    def assemble(self, nodes: Sequence[onnx_ir.Node]) -> ExecutionPlan:
        self.fused, gone = gated_activations(nodes, self.outputs)
        for node in nodes:
            if node not in gone:
                self._add(node)
        outputs = tuple(self._slot(value, None) for value in self.outputs)
        bound = [slot for slot, value in enumerate(self.template) if value is not None]
        kept = frozenset((MISSING, UNWANTED, *outputs, *bound))
        frees = freed_after([(step.inputs, step.outputs) for step in self.steps], kept)
        steps = tuple(
            ExecutionStep(step.function, step.inputs, step.outputs, free, step.label)
            for step, free in zip(self.steps, frees, strict=True)
        )
        frugal = tuple(
            step._replace(function=planned.in_place) if planned.in_place is not None else step
            for step, planned in zip(steps, self.steps, strict=True)
        )
        return ExecutionPlan(self.template, self.inputs, outputs, steps, frugal)

    def _new(self, value: onnx_ir.Value, content: Any = None) -> int:
        self.slots[value] = len(self.template)
        self.template.append(content)
        return self.slots[value]

    def _slot(self, value: onnx_ir.Value | None, node: onnx_ir.Node | None) -> int:
        if value is None:
            return MISSING
        if (slot := self.slots.get(value)) is not None:
            return slot
        if value in self.compiler.parameters:
            return self._new(value, self.compiler.parameters[value])
        if self.compiler.load(value):
            return self._new(value, self.compiler.constants[value])
        where = f"Node {label(node)!r} needs value" if node is not None else "Output"
        raise ModelNotRunnableError(f"{where} {value.name!r}, which is neither computed nor given as an input.")

    def _add(self, node: onnx_ir.Node) -> None:
        """Makes a step of the node, or computes it at once if all that it reads is constant."""
        compiler = self.compiler
        fused = self.fused.get(node) or fake_quantization(node, self.outputs, self._constant)
        if fused is not None:
            self._emit(node, fused.function, fused.in_place, fused.inputs)
            return
        # A QuantizeLinear that its DequantizeLinear takes in has no step of its own.
        reader = only_consumer(node.outputs[0]) if is_op(node, "QuantizeLinear") else None
        if reader is not None and fake_quantization(reader, self.outputs, self._constant) is not None:
            return
        if node.outputs and node.outputs[0] in compiler.parameters:
            return  # a Constant node whose tensor is trained
        entry = compiler.entry(node)
        # Subgraphs read outer values by name; their plans get them as further inputs.
        graphs, captured = subgraphs(node), captured_values(node)
        operands = [value for value in (*node.inputs, *captured) if value is not None]
        loaded = [compiler.load(value) for value in operands]
        subplans = {
            name: compiler.compile(list(graph), (*graph.inputs, *captured), graph.outputs)
            for name, graph in graphs.items()
        }
        site = Site(
            node, opset_version(node, compiler.opsets), compiler.constants, subplans, compiler.device,
            keeps_gradient=node.op_type == "QuantizeLinear" and _is_only_dequantized(node.outputs[0], self.outputs),
        )  # fmt: skip
        function = _for_types(entry.build(site), entry, site)
        if compiler.device.type != "cpu":
            function = _on_device(function, frozenset(site.host_inputs), compiler.device)
        if all(loaded) and entry.deterministic and self._fold(node, function, (*node.inputs, *captured)):
            return
        self._emit(node, function, in_place(site), (*node.inputs, *captured))

    def _constant(self, value: onnx_ir.Value | None) -> Tensor | None:
        found = self.compiler.constants[value] if value is not None and self.compiler.load(value) else None
        return found if isinstance(found, Tensor) else None

    def _emit(
        self, node: onnx_ir.Node, function: Function, frugal: Function | None, operands: Sequence[onnx_ir.Value | None]
    ) -> None:
        inputs = tuple(self._slot(value, node) for value in operands)
        outputs = tuple(self._new(value) if value.name else UNWANTED for value in node.outputs)
        first = operands[0] if operands else None
        own = may_overwrite(first, self.outputs, self.given) and first not in self.compiler.constants
        usable = frugal if own else None
        self.steps.append(_Planned(function, usable, inputs, outputs, f"{label(node)!r} ({node.op_type})"))

    def _fold(self, node: onnx_ir.Node, function: Function, operands: Sequence[onnx_ir.Value | None]) -> bool:
        """Computes the node's outputs here and now, unless they are far larger than its inputs."""
        values = [None if value is None else self.compiler.constants[value] for value in operands]
        try:
            with torch.no_grad():
                result = function(*values)
        except (RuntimeError, TypeError, ValueError, IndexError, AttributeError, NotImplementedError):
            return False  # left to fail where it runs, since a branch may never be taken
        results = result if isinstance(result, tuple) else (result,)
        limit = max(_FOLD_ALWAYS_BYTES, _FOLD_GROWTH * sum(map(_bytes, values)))
        if sum(map(_bytes, results)) > limit and node.op_type != "Constant":
            return False
        self.compiler.constants.update(zip(node.outputs, results, strict=False))
        return True


def laid_out(value: onnx_ir.Value, tensor: Any) -> Any:
    """Weights of two-dimensional convolutions with their channels last: convolutions then run without reordering, and
    hand this layout on to what follows."""
    if not isinstance(tensor, Tensor) or tensor.dim() != 4 or not _reaches_convolution(value):
        return tensor
    return tensor.contiguous(memory_format=torch.channels_last)


def _reaches_convolution(value: onnx_ir.Value, hops: int = 2) -> bool:
    for node, position in value.uses():
        if node.op_type in ("Conv", "FusedConv") and position == 1:
            return True
        quantizes = node.op_type in ("QuantizeLinear", "DequantizeLinear") and position == 0 and hops > 0
        if quantizes and _reaches_convolution(node.outputs[0], hops - 1):
            return True
    return False


def _bytes(value: Any) -> int:
    return value.numel() * value.element_size() if isinstance(value, Tensor) else 0


def _is_only_dequantized(value: onnx_ir.Value, kept: Sequence[onnx_ir.Value]) -> bool:
    """Whether every way from the value leads to a DequantizeLinear, through operators that only move numbers."""
    frontier = [value]
    while frontier:
        current = frontier.pop()
        if current.is_graph_output() or current in kept:
            return False
        for node, position in current.uses():
            if node.op_type in _CARRIERS and position == 0:
                frontier.extend(node.outputs)
            elif node.op_type != "DequantizeLinear" or position != 0:
                return False
    return True


def _for_types(function: Function, operator: Operator, site: Site) -> Function:
    """The function for unsigned integers of 16 to 64 bits: computed in a signed type, returned in their own."""
    node = site.node
    wanted = [site.output_dtype(index) for index in range(len(node.outputs))]
    types = {*(site.dtype(index) for index in range(len(node.inputs))), *wanted}
    if operator.carries_unsigned or not types & UNSIGNED:
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


def _on_device(function: Function, host_inputs: frozenset[int], device: torch.device) -> Callable[..., Any]:
    """The function on an accelerator: shape arithmetic stays on the CPU until it meets values of the device."""

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
