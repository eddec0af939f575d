"""What a large model's weights in fewer bits stand for, written into a file before onnxruntime opens the model.

Such weights become float32 by chains of nodes that read constants alone (`encodings.folded`). onnxruntime computes them
when it loads a model, and keeps what every node of them gives until all are done: twice the float model or more. Here
the chains are computed one after the other, by onnxruntime itself, and it maps what they give, as weights in files. The
session is the same in the end, and holds its own copy of the weights alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import onnx_ir
from numpy.typing import NDArray

from modelpress_compression import mapped

# From a serialized model without inputs to what its one output holds.
Evaluate = Callable[[bytes], NDArray[np.generic]]
# What chains are made of. A DequantizeLinear is not among them: onnxruntime leaves it where it is, and fuses it.
_FOLDED = frozenset(("Cast", "Mul", "Add", "Sub", "Div", "Floor", "Reshape", "Concat", "Slice", "Transpose"))


def prefolded(ir: onnx_ir.Model, path: Path, evaluate: Evaluate) -> onnx_ir.Model | None:
    """A clone of the model whose long chains of constant nodes in the main graph are weights in the file `path`.

    None, and no file, where it has no such chains. Raises OSError, and what `evaluate` raises.
    """
    if not any(_results(ir.graph)):
        return None
    light = ir.clone()
    with path.open("wb") as file:
        for result in list(_results(light.graph)):
            chain = _chain(light.graph, result)
            array = evaluate(onnx_ir.to_proto(_alone(light, chain, result)).SerializeToString())
            file.seek(-file.tell() % mapped.ALIGNMENT_BYTES, 1)
            place = path, file.tell()
            file.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
            _put(light.graph, chain, result, onnx_ir.Tensor(array, name=result.name), place)
    return light


def _results(graph: onnx_ir.Graph) -> Iterator[onnx_ir.Value]:
    """Values that chains of constant nodes give to other nodes, as far as the chains read large constants."""
    sizes: dict[onnx_ir.Value, int] = {}  # of the constants behind each value
    for node in graph:
        if node.domain or node.op_type not in _FOLDED or not _gives_numbers(node):
            continue
        behind = [sizes.get(value, _constant_bytes(value)) for value in node.inputs if value is not None]
        if None not in behind:
            sizes[node.outputs[0]] = sum(size for size in behind if size is not None)
    for value, size in sizes.items():
        readers = [node for node, _ in value.uses()]
        inside = all(node.graph is graph and node.outputs[0] in sizes for node in readers)
        if size >= mapped.MAPPED_BYTES and value.name and not value.is_graph_output() and not inside:
            yield value


def _gives_numbers(node: onnx_ir.Node) -> bool:
    """Whether the result is of a type that onnxruntime hands over: not bfloat16, and others that numpy lacks."""
    to = node.attributes.get("to")
    return to is None or mapped.is_plain(onnx_ir.DataType(to.as_int()))


def _constant_bytes(value: onnx_ir.Value) -> int | None:
    """Of an initializer that no caller can override; else None."""
    is_constant = value.is_initializer() and not value.is_graph_input() and value.const_value is not None
    return value.const_value.nbytes if is_constant and value.const_value is not None else None


def _chain(graph: onnx_ir.Graph, result: onnx_ir.Value) -> list[onnx_ir.Node]:
    """The nodes that compute it, in their order."""
    found, waiting = set(), [result]
    while waiting:
        node = waiting.pop().producer()
        if node is not None and node not in found:
            found.add(node)
            waiting += [value for value in node.inputs if value is not None]
    return [node for node in graph if node in found]


def _alone(ir: onnx_ir.Model, chain: list[onnx_ir.Node], result: onnx_ir.Value) -> onnx_ir.Model:
    """The chain as a model of its own, its constants in it."""
    made = {value for node in chain for value in node.outputs}
    constants = dict.fromkeys(
        value for node in chain for value in node.inputs if value is not None and value not in made
    )
    view = onnx_ir.GraphView(
        [],
        [result],
        nodes=chain,
        initializers=list(constants),
        opset_imports=dict(ir.graph.opset_imports),
        name="chain",
    )
    part = onnx_ir.Model(view.clone(), ir_version=ir.ir_version)
    mapped.load_all(part)
    return part


def _put(
    graph: onnx_ir.Graph,
    chain: list[onnx_ir.Node],
    result: onnx_ir.Value,
    tensor: onnx_ir.TensorProtocol,
    place: tuple[Path, int],
) -> None:
    """The tensor, which lies at a place in a file, takes the place of the chain's result."""
    weight = onnx_ir.Value(
        name=result.name, type=onnx_ir.TensorType(tensor.dtype), shape=onnx_ir.Shape(tensor.shape.numpy())
    )
    mapped.stored_at(weight, tensor, *place)
    onnx_ir.convenience.replace_all_uses_with(result, weight)
    for node in reversed(chain):
        if not any(value.uses() or value.is_graph_output() for value in node.outputs):
            read = list(node.inputs)
            graph.remove(node, safe=True)
            # onnxruntime takes constants from memory only where a node reads them.
            for value in read:
                if value is not None and value.is_initializer() and not value.uses() and not value.is_graph_output():
                    graph.initializers.pop(value.name or "", None)
    graph.register_initializer(weight)
