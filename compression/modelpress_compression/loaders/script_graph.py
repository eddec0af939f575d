"""TorchScript modules in operators that can be exported: the same computation in plain floating-point operators.

A frozen module is one graph whose weights are constants. In it are rewritten

- bfloat16, which onnxruntime does not compute on a CPU: weights, constants and casts become float32, which holds every
  bfloat16 exactly (`widen`);
- quantized layers, see `script_quantized`;
- Python's floats, which tracing writes as tensors of float64 without axes. As long as torch remembers what they were,
  an integer tensor divided by one is float32; in a copy of the graph it is float64 (`_number_constants`);
- what `nn.TransformerEncoder` asks before it takes its fast path (`x.is_nested`, autocast, whether masks hide the end
  of each row): answered as in inference, so that one way is left, which `symbolics` knows.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from modelpress_compression.loaders.quiet import quiet
from modelpress_compression.loaders.script_quantized import QUANTIZED, dequantize, nodes_of

_BFLOAT16, _FLOAT32 = 15, 6  # of c10::ScalarType, as graphs have them
# Where slices end that have no end.
TO_THE_END = 2**63 - 1
_DTYPE_ARGUMENTS = ("dtype", "cpu_dtype")
# What a module asks about how it is run, and the answers in inference on a CPU; nested tensors are padded ones here.
_ANSWERS = {
    "prim::is_nested": False,
    "aten::_nested_tensor_from_mask_left_aligned": True,
    "aten::is_grad_enabled": False,
    "aten::is_autocast_enabled": False,
    "aten::is_autocast_cpu_enabled": False,
}
# Questions about a tensor whose answers ONNX has for good.
_FIXED = frozenset(
    {
        "aten::dim", "prim::dtype", "prim::device", "aten::is_floating_point", "prim::is_cuda", "prim::layout",
        "aten::__is__", "aten::__isnot__",
    }
)  # fmt: skip
_ROUNDS = 50  # branches within branches
# Operators that take a number in the place of their second tensor.
_OF_NUMBERS = frozenset(
    f"aten::{name}{suffix}"
    for name in ("add", "sub", "mul", "div", "pow", "remainder", "fmod", "floor_divide", "true_divide")
    for suffix in ("", "_")
)


def in_plain_operators(module: torch.jit.ScriptModule, example: Sequence[torch.Tensor] = ()) -> torch.jit.ScriptModule:
    """A module that computes the same without bfloat16, quantized layers and questions; itself where it has none.

    `example`: inputs it will be exported with; branches on their number of axes, type and device are taken as with
    these. `module` is used up. Raises RuntimeError where torch cannot freeze it.
    """
    _number_constants(module)
    wide = holds_bfloat16(module)
    quantized = holds_quantized(module)
    if not wide and not quantized and kinds_of(module).isdisjoint(_ANSWERS):
        return module
    with quiet():
        if wide:
            # Before the constants are folded, which would round to 8 bits of mantissa.
            module._apply(_widened)  # type: ignore[no-untyped-call]
        frozen: torch.jit.ScriptModule = torch.jit.freeze(module, optimize_numerics=False)
        graph: Any = frozen.graph
        torch._C._jit_pass_erase_shape_information(graph)
        if quantized:
            dequantize(graph)
        if wide:
            _widen(graph)
        _answer(graph)
        _simplify(graph)
        if example:
            _specialize(graph, (frozen, *example))
    return frozen


def _number_constants(module: torch.jit.ScriptModule) -> None:
    """Tensors of float64 without axes that arithmetic reads become the numbers that they are, in place."""
    for part in module.modules():
        inner: Any = part._c
        for name in inner._method_names():
            graph = inner._get_method(name).graph
            for node in nodes_of(graph):
                if node.kind() in _OF_NUMBERS and (number := _number(node.inputsAt(1).node())) is not None:
                    with graph.insert_point_guard(node):
                        node.replaceInput(1, graph.insertConstant(number))


def _number(node: Any) -> float | None:
    tensors = _tensors(node)
    return tensors[0].item() if len(tensors) == 1 and _is_number(tensors[0]) else None


def _is_number(tensor: torch.Tensor) -> bool:
    return tensor.dtype == torch.float64 and tensor.dim() == 0


def holds_bfloat16(module: torch.jit.ScriptModule) -> bool:
    """Whether a weight, a constant or a cast of the module is bfloat16."""
    if any(tensor.dtype == torch.bfloat16 for tensor in (*module.parameters(), *module.buffers())):
        return True
    nodes = list(nodes_of(module.inlined_graph))
    return any(_casts(node) for node in nodes) or any(
        tensor.dtype == torch.bfloat16 for node in nodes for tensor in _tensors(node)
    )


def holds_quantized(module: torch.jit.ScriptModule) -> bool:
    """Whether layers or tensors of the module are quantized."""
    return not kinds_of(module).isdisjoint(QUANTIZED - {"prim::is_quantized"})


def kinds_of(module: torch.jit.ScriptModule) -> set[str]:
    """Of all operators that `forward` runs, those of its methods and blocks included."""
    return {node.kind() for node in nodes_of(module.inlined_graph)}


def _tensors(node: Any) -> list[torch.Tensor]:
    if node.kind() != "prim::Constant" or not node.hasAttribute("value"):
        return []
    kind = node.kindOf("value")
    return [node.t("value")] if kind == "t" else list(node.ts("value")) if kind == "ts" else []


def _casts(node: Any) -> list[int]:
    """Positions of the node's inputs that say bfloat16."""
    schema = node.schema()
    if "dtype" not in schema:
        return []
    names = [argument.name for argument in torch._C.parse_schema(schema).arguments]
    values = list(node.inputs())
    return [
        index
        for index, (name, value) in enumerate(zip(names, values, strict=False))
        if name in _DTYPE_ARGUMENTS and value.toIValue() == _BFLOAT16
    ]


def _widened(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.float() if tensor.dtype == torch.bfloat16 else tensor


def _widen(graph: Any) -> None:
    for node in nodes_of(graph):
        for index in _casts(node):
            with graph.insert_point_guard(node):
                node.replaceInput(index, graph.insertConstant(_FLOAT32))
        tensors = _tensors(node)
        if any(tensor.dtype == torch.bfloat16 for tensor in tensors):
            if node.kindOf("value") == "t":
                node.t_("value", _widened(tensors[0]))
            else:
                node.ts_("value", [_widened(tensor) for tensor in tensors])


def _answer(graph: Any) -> None:
    for node in nodes_of(graph):
        if node.kind() in _ANSWERS:
            with graph.insert_point_guard(node):
                node.output().replaceAllUsesWith(graph.insertConstant(_ANSWERS[node.kind()]))


def _simplify(graph: Any) -> None:
    torch._C._jit_pass_constant_propagation(graph)
    torch._C._jit_pass_dce(graph)


def _specialize(graph: Any, arguments: Sequence[Any]) -> None:
    """Takes branches that depend on fixed properties of tensors alone, outer ones first, by running what they ask."""
    for _ in range(_ROUNDS):
        # Of a copy, so that it can be cut down to the questions; places in the list of nodes name them in both.
        part = graph.copy()
        asked = [(index, output) for index, node in enumerate(part.nodes()) for output in _questions(node)]
        if not asked:
            return
        while list(part.outputs()):
            part.eraseOutput(0)
        for _, value in asked:
            part.registerOutput(value)
        part.makeMultiOutputIntoTuple()
        torch._C._jit_pass_dce(part)
        function: Any = torch._C._create_function_from_graph("part", part)
        nodes = list(graph.nodes())
        for (index, _), answer in zip(asked, function(*arguments), strict=True):
            node = nodes[index]
            with graph.insert_point_guard(node):
                constant = graph.insertConstant(answer)
            if node.kind() == "prim::If":
                node.replaceInput(0, constant)
            else:
                node.output().replaceAllUsesWith(constant)
        _simplify(graph)


def _questions(node: Any) -> list[Any]:
    """What of this node is worth knowing: an answer that is fixed, or that of a branch."""
    if node.kind() in _FIXED:
        return [node.output()]
    if node.kind() == "prim::If" and node.inputsAt(0).node().kind() != "prim::Constant" and _is_fixed(node.inputsAt(0)):
        return [node.inputsAt(0)]
    return []


def _is_fixed(value: Any) -> bool:
    """Whether the value is made of answers and constants only; lists with all that is put into them."""
    stack, seen = [value], set()
    while stack:
        item = stack.pop()
        if item.unique() in seen:
            continue
        seen.add(item.unique())
        node = item.node()
        if node.kind() in _FIXED or node.kind() == "prim::Constant":
            continue
        if node.kind() in ("prim::Param", "prim::If", "prim::Loop") or str(item.type()) == "Tensor":
            return False
        stack.extend(node.inputs())
        stack.extend(use.user.inputsAt(1) for use in item.uses() if use.user.kind() == "aten::append")
    return True
