"""Constant folding with bounds: what a small file can blow up to is refused before it is computed.

First onnxscript's folding pass follows shapes (Shape, Gather, Concat, Reshape of what is known) and puts the branch of
an If with a constant condition in its place; it evaluates small constants only. Then whole *regions* of nodes that
depend on constants alone are evaluated at once, by onnxruntime: a region is judged by what goes in and what comes out,
so that a weight which the exporter cut into pieces and put together again becomes one initializer.

    a node whose output shape is not known beforehand        is not folded
    a node that makes 64 KiB more than goes into it          is not folded (ConstantOfShape, Expand, Tile, ...)
    a region whose results take more bytes in a file than
    the constants that it frees and its nodes                is not folded (Transpose of a weight with other users)
    quantization operators, random ones, those with
    subgraphs, those of other domains, excluded ones         are never folded
"""

from __future__ import annotations

import contextlib
import math
from collections import defaultdict
from dataclasses import dataclass, field

import onnx_ir
from onnx_ir.passes import common as ir_passes
from onnxscript.optimizer import _constant_folding as folding

from modelpress_compression.errors import CompressionError
from modelpress_compression.graph.compact import stored_bytes
from modelpress_compression.graph.read import constant_tensor, is_op
from modelpress_compression.graph.subgraphs import subgraphs
from modelpress_compression.graph.watch.extract import as_model
from modelpress_compression.inputs import Array
from modelpress_compression.model import Model, Provenance
from modelpress_compression.noise import RANDOM
from modelpress_compression.passes.fuse.rewriting import Scope
from modelpress_compression.runtime import run, session_of

MAX_GROWTH_BYTES = 64 * 1024  # 64 KiB
NODE_BYTES = 64  # of a node in a file, with its names
# The largest tensor that is computed: a weight of any layer, but no bomb.
MAX_OUTPUT_BYTES = 1024 * 1024 * 1024  # 1 GiB
_SMALL_BYTES = 8 * 1024  # 8 KiB

_NEVER = (
    "Constant", "QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear", *RANDOM,
)  # fmt: skip


_UNIFORM = ("ConstantOfShape", "Expand", "Tile")


@dataclass
class _Region:
    """Connected nodes that depend on constants alone. `outputs`: what others use of them."""

    nodes: list[onnx_ir.Node] = field(default_factory=list)
    outputs: list[onnx_ir.Value] = field(default_factory=list)
    freed_bytes: int = 0


def fold_constants(scope: Scope) -> int:
    """Folds in place; how many nodes went. Constant nodes become initializers of the main graph first."""
    model = scope.ir
    lift_constants(model)
    before = sum(1 for _ in model.graph.all_nodes())
    follow = folding.FoldConstantsPass(
        shape_inference=True,
        input_size_limit=_SMALL_BYTES // 8,
        output_size_limit=_SMALL_BYTES // 8,
        should_fold=lambda node: None if _small(node) and _foldable(node, scope) else False,
    )
    # It stops at a node that it cannot follow, such as SplitToSequence by a scalar input; what it did by then holds.
    with contextlib.suppress(RuntimeError):
        follow(model)
    lift_constants(model)
    for region in _regions(scope):
        _evaluate(region, scope)
    ir_passes.RemoveUnusedNodesPass()(model)
    return before - sum(1 for _ in model.graph.all_nodes())


def lift_constants(model: onnx_ir.Model) -> None:
    """Constant nodes become initializers, those of subgraphs initializers of the main graph."""
    ir_passes.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
    ir_passes.LiftSubgraphInitializersToMainGraphPass()(model)


def _static_bytes(value: onnx_ir.Value) -> int | None:
    if value.shape is None or value.dtype is None or not value.shape.is_static() or value.dtype.is_string():
        return None
    return math.ceil(math.prod(value.shape.numpy()) * value.dtype.bitwidth / 8)


def _small(node: onnx_ir.Node) -> bool:
    """Whether everything that goes in and comes out is small, and known to be."""
    inputs = [constant_tensor(value) for value in node.inputs if value is not None]
    outputs = [_static_bytes(value) for value in node.outputs]
    return all(tensor is None or tensor.nbytes <= _SMALL_BYTES for tensor in inputs) and all(
        size is not None and size <= _SMALL_BYTES for size in outputs
    )


def _foldable(node: onnx_ir.Node, scope: Scope) -> bool:
    if node.domain not in ("", "ai.onnx") or is_op(node, *_NEVER) or scope.excluded(node):
        return False
    return not subgraphs(node) and not any(attribute.is_ref() for attribute in node.attributes.values())


def _regions(scope: Scope) -> list[_Region]:
    """Connected components of the foldable nodes, each in the graph's order; linear in nodes and uses."""
    inside: dict[int, onnx_ir.Node] = {}
    parent: dict[int, int] = {}

    def root(item: int) -> int:
        while parent[item] != item:
            parent[item] = parent[parent[item]]
            item = parent[item]
        return item

    for node in scope.ir.graph.all_nodes():
        if not _foldable(node, scope) or not _bounded(node, inside):
            continue
        inside[id(node)], parent[id(node)] = node, id(node)
        for value in node.inputs:
            # Two nodes that cut pieces out of one weight belong together: only both of them free it.
            sources = [] if value is None else [value.producer(), *value.consumers()]
            for other in sources:
                if other is not None and id(other) in parent and _large(value):
                    parent[root(id(other))] = root(id(node))
    members: dict[int, _Region] = defaultdict(_Region)
    for key, node in inside.items():
        members[root(key)].nodes.append(node)
    for region in members.values():
        _account(region)
    return list(members.values())


def _large(value: onnx_ir.Value | None) -> bool:
    """Small constants that half of the model uses (axes, shapes) tie nothing together."""
    if value is None or value.producer() is not None:
        return value is not None
    tensor = constant_tensor(value)
    return tensor is not None and tensor.nbytes > _SMALL_BYTES


def _bounded(node: onnx_ir.Node, inside: dict[int, onnx_ir.Node]) -> bool:
    """Inputs are constants or computed from constants; outputs are known to be no larger than what goes in, nearly."""
    input_bytes = 0
    for value in node.inputs:
        if value is None:
            continue
        tensor, producer = constant_tensor(value), value.producer()
        if tensor is None and (producer is None or id(producer) not in inside):
            return False
        if tensor is not None and tensor.dtype.is_string():
            return False
        input_bytes += tensor.nbytes if tensor is not None else (_static_bytes(value) or 0)
    sizes = [_static_bytes(value) for value in node.outputs]
    known = [size for size in sizes if size is not None]
    if len(known) < len(sizes) or any(output.is_graph_output() for output in node.outputs):
        return False
    return sum(known) <= min(input_bytes + MAX_GROWTH_BYTES, MAX_OUTPUT_BYTES)


def _account(region: _Region) -> None:
    """Fills in what others use of the region, and what the model would be rid of."""
    own = {id(node) for node in region.nodes}
    freed: dict[int, int] = {}
    for node in region.nodes:
        region.outputs += [o for o in node.outputs if any(id(user) not in own for user in o.consumers())]
        for value in node.inputs:
            tensor = constant_tensor(value)
            if value is None or tensor is None or value.is_graph_output():
                continue
            if id(value) not in freed and all(id(user) in own for user in value.consumers()):
                freed[id(value)] = tensor.nbytes
    region.freed_bytes = sum(freed.values()) + NODE_BYTES * len(region.nodes)


def _evaluate(region: _Region, scope: Scope) -> None:
    """Runs the region in onnxruntime and puts its results in its place, if it runs and the model does not grow."""
    # Uniform numbers are written as one, and at most half of the bytes of others are saved.
    least = sum(_static_bytes(output) or 0 for output in region.outputs) // 2
    if least > region.freed_bytes and not any(is_op(node, *_UNIFORM) for node in region.nodes):
        return
    try:
        with session_of(_standalone(region, scope), optimize=False) as session:
            results = list(run(session, {}).values())
    except CompressionError:
        return  # the nodes stay, and the model is as runnable as it was
    if sum(stored_bytes(array) for array in results) > region.freed_bytes:
        return
    for output, array in zip(region.outputs, results, strict=True):
        _replace(output, array, scope)
    scope.remove_unused(reversed(region.nodes))


def _replace(output: onnx_ir.Value, array: Array, scope: Scope) -> None:
    constant = scope.constant(scope.ir.graph, array, output.name or "folded")
    output.replace_all_uses_with(constant)


def _standalone(region: _Region, scope: Scope) -> Model:
    """A model without inputs that computes the region's outputs."""
    ir = as_model(scope.ir, region.nodes, region.outputs)
    # The region may take in nodes of several branches, which may use the same names, each in its own scope.
    for number, value in enumerate(value for node in ir.graph for value in node.outputs):
        value.name = f"modelpress.folding.{number}"
    return Model(ir, Provenance("onnx", "", 0))
