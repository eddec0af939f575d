"""What a torch.export program writes into: buffers that it keeps between calls, and inputs that it changes in place.

An ONNX model keeps nothing, so a write becomes an output, or goes:

    counter.add_(1); y = x * counter     counter stays a weight                  y = x * (counter + 1)
    --input 'counter:float32[1]'         counter is an input and an output       y, counter_out = ...

The writes are found in the graph (`add_(b_counter, 1)`), which `run_decompositions({})` makes functional: each becomes
an output that the signature calls a mutation.
"""

from __future__ import annotations

import operator
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.export.graph_signature import InputKind, InputSpec, OutputKind, OutputSpec
from torch.utils import _pytree as pytree

from modelpress_compression.loaders.quiet import quiet

STATE_WARNING = (
    "The program keeps state between calls (it writes into {names}); the ONNX model starts every call from the state "
    "that was saved. Give --input '{example}' to have such a buffer as an input, and its new value as the output "
    "'{output}'."
)
_INPUT_WARNING = (
    "The program writes into its input {names}, which an ONNX model cannot; its outputs are the same, and the new "
    "value is left out. Return it from forward to have it."
)
_MUTATIONS = (OutputKind.BUFFER_MUTATION, OutputKind.USER_INPUT_MUTATION, OutputKind.PARAMETER_MUTATION)
# Batch normalization's own, which only training changes.
_STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


@dataclass(frozen=True)
class Stateless:
    """A program that writes into nothing.

    `state`: buffers that are inputs of it now, behind the others and in this order, the node's name -> the buffer's;
    their new values are its last outputs. `warnings` say what else it wrote into.
    """

    program: torch.export.ExportedProgram
    state: dict[str, str]
    warnings: tuple[str, ...] = ()


def without_state(program: torch.export.ExportedProgram, wanted: Collection[str]) -> Stateless:
    """The program without its writes; buffers named in `wanted` become inputs and outputs where it writes into them.

    `program` is used up where it writes into something.
    """
    if not _writes(program):
        return Stateless(program, {})
    with quiet():
        program = program.run_decompositions({})
    signature = program.graph_signature
    written = [spec for spec in signature.output_specs if spec.kind in _MUTATIONS]
    buffers = [str(spec.target) for spec in written if spec.kind != OutputKind.USER_INPUT_MUTATION]
    inputs = [str(spec.target) for spec in written if spec.kind == OutputKind.USER_INPUT_MUTATION]
    kept = [name for name in buffers if name in wanted]
    lost = [name for name in buffers if name not in wanted and not name.endswith(_STATISTICS)]
    warnings = []
    if lost:
        example = _spec_text(lost[0], _value(program, lost[0]))
        names = ", ".join(lost[:5]) + (f" and {len(lost) - 5} more" if len(lost) > 5 else "")
        warnings.append(STATE_WARNING.format(names=names, example=example, output=output_name(lost[0])))
    if inputs:
        warnings.append(_INPUT_WARNING.format(names=", ".join(inputs)))
    lifted, state = _lift(program, kept)
    return Stateless(lifted, state, tuple(warnings))


def output_name(buffer: str) -> str:
    """What the new value of a buffer is called."""
    return f"{buffer}_out"


def _writes(program: torch.export.ExportedProgram) -> bool:
    """Whether anything that is given to the graph is written into, be it through a view of it."""
    if any(spec.kind in _MUTATIONS for spec in program.graph_signature.output_specs):
        return True
    return any(_origin(node).op == "placeholder" for call in program.graph.nodes for node in _written(call))


def _written(node: torch.fx.Node) -> list[torch.fx.Node]:
    found = [
        node.args[index] if index < len(node.args) else node.kwargs.get(argument.name)
        for index, argument in enumerate(_arguments(node))
        if argument.alias_info is not None and argument.alias_info.is_write
    ]
    return [item for item in found if isinstance(item, torch.fx.Node)]


def _arguments(node: torch.fx.Node) -> Sequence[Any]:
    schema = getattr(node.target, "_schema", None) if node.op == "call_function" else None
    return schema.arguments if schema else ()


def _origin(node: torch.fx.Node) -> torch.fx.Node:
    """What a chain of views and writes began with."""
    while True:
        parts = node.args[:1] if node.target is operator.getitem else ()
        aliased = [
            node.args[index]
            for index, argument in enumerate(_arguments(node))
            if argument.alias_info is not None and index < len(node.args)
        ]
        before = next((item for item in (*parts, *aliased) if isinstance(item, torch.fx.Node)), None)
        if before is None:
            return node
        node = before


def _lift(
    program: torch.export.ExportedProgram, kept: Sequence[str]
) -> tuple[torch.export.ExportedProgram, dict[str, str]]:
    """Buffers named in `kept` as inputs and outputs, all other writes left out."""
    graph, signature = program.graph, program.graph_signature
    placeholders = {node.name: node for node in graph.nodes if node.op == "placeholder"}
    by_buffer = {buffer: name for name, buffer in signature.inputs_to_buffers.items()}
    state = {by_buffer[buffer]: buffer for buffer in kept if buffer in by_buffer}
    last = list(placeholders.values())[-1]
    for name in state:
        if last is not placeholders[name]:
            last.append(placeholders[name])
            last = placeholders[name]
    inputs = [spec for spec in signature.input_specs if spec.arg.name not in state]
    inputs += [InputSpec(InputKind.USER_INPUT, _argument(signature.input_specs, name), None) for name in state]
    results = list(zip(graph.output_node().args[0], signature.output_specs, strict=True))
    outputs = [(node, spec) for node, spec in results if spec.kind not in _MUTATIONS]
    written = {spec.target: (node, spec) for node, spec in results if spec.kind == OutputKind.BUFFER_MUTATION}
    for buffer in state.values():
        node, spec = written[buffer]
        outputs.append((node, OutputSpec(OutputKind.USER_OUTPUT, spec.arg, None)))
    graph.output_node().args = (tuple(node for node, _ in outputs),)
    graph.eliminate_dead_code()
    program.graph_module.recompile()
    call = program.module_call_graph[0]
    taken = sum(spec.kind == InputKind.USER_INPUT for spec in inputs)
    call.signature = replace(
        call.signature,
        in_spec=pytree.tree_structure(((0,) * taken, {})),
        out_spec=pytree.tree_structure((0,) * len(outputs)),
        forward_arg_names=[spec.arg.name for spec in inputs if spec.kind == InputKind.USER_INPUT],
    )
    return (
        torch.export.ExportedProgram(
            root=program.graph_module,
            graph=graph,
            graph_signature=torch.export.ExportGraphSignature(inputs, [spec for _, spec in outputs]),
            state_dict={name: value for name, value in program.state_dict.items() if name not in state.values()},
            range_constraints=program.range_constraints,
            module_call_graph=[call],
            constants={name: value for name, value in program.constants.items() if name not in state.values()},
            verifiers=program.verifiers,
        ),
        state,
    )


def _argument(specs: Sequence[InputSpec], name: str) -> Any:
    return next(spec.arg for spec in specs if spec.arg.name == name)


def _value(program: torch.export.ExportedProgram, name: str) -> torch.Tensor:
    found = program.state_dict.get(name, program.constants.get(name))
    return found if isinstance(found, torch.Tensor) else torch.zeros(1)


def _spec_text(name: str, value: torch.Tensor) -> str:
    return f"{name}:{str(value.dtype).removeprefix('torch.')}[{','.join(map(str, value.shape))}]"
