"""Whole branches beside a skip connection go: fewer layers, where narrower ones would hardly be faster.

    y = x + f(x)   ->   y = x            x, f(x): values of the same shape; f holds at least one layer

A branch is what only one operand of an Add needs; of the two operands the one that stays is that which needs fewer
numbers, a projection as often as the input itself. Small layers take about as long at half their width, so that on
small networks depth is what costs time (Fu et al., arXiv:2206.00843); and a residual network bears the loss of a block
(Veit et al., arXiv:1605.06431).

Those branches go without which the answers change the least for what they cost, measured one at a time, until
`sparsity` of them have gone. Then the layers behind them are fitted to the uncut model's answers (passes/repair). With
an override, a branch goes where that is at least one half, and stays where it is less.

A branch stays where the shapes of both operands are not known to be the same, or an input of the model would lose all
its readers.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir

from modelpress_compression.graph.edit import Editor, clean
from modelpress_compression.graph.linear import linear_of
from modelpress_compression.graph.read import constant_tensor, is_constant, is_op, label, required
from modelpress_compression.graph.shapes import sample_shapes, shape_of, static_shapes
from modelpress_compression.graph.subgraphs import needed_nodes, read_values
from modelpress_compression.inputs import InputData
from modelpress_compression.measure.node_times import node_times_ms
from modelpress_compression.model import Model
from modelpress_compression.passes.base import Context, PassResult, Skip, is_excluded, require_data, unmatched_excludes
from modelpress_compression.passes.prune.channel.bearable import Answers
from modelpress_compression.passes.prune.channel.costs import node_macs
from modelpress_compression.passes.prune.channel.report import unrepaired
from modelpress_compression.passes.prune.config import PruneConfig
from modelpress_compression.passes.prune.overrides import override_of, unmatched_overrides
from modelpress_compression.passes.repair.least_squares import Changes, Repair, repair

_GOES = 0.5  # an override of at least this
# Shares of the pass's time that have gone by when branches are judged.
_JUDGED = 0.5


@dataclass(frozen=True)
class Branch:
    """`id`: label of the Add that it ends in; `output`: name of the sum; `kept`: place of the operand that stays;
    `nodes`: labels of what goes; `tensors`: names of the constants that go; `parameters`: how many numbers these are.
    """

    id: str
    output: str
    kept: int
    nodes: frozenset[str]
    tensors: frozenset[str]
    parameters: int


def find_branches(model: Model, data: InputData) -> tuple[list[Branch], list[Skip]]:
    """Those of the main graph, in its order, and why others must stay. `data`: whose shapes decide."""
    known = static_shapes(model, sample_shapes(data))
    shapes = {value.name: shape_of(value) for node in known.graph for value in node.outputs}
    shapes |= {value.name: shape_of(value) for value in known.graph.inputs}
    before = dict.fromkeys(needed_nodes(model.graph, (), model.graph.outputs))
    found, skipped = [], []
    for node in model.graph:
        if not is_op(node, "Add") or any(value is None or is_constant(value) for value in node.inputs):
            continue
        branch = _branch(model, before, node)
        if branch is None:
            continue
        first, second = (shapes.get(required(node, place).name) for place in (0, 1))
        if first is None or first != second:
            skipped.append(Skip(branch.id, "The operands of its sum are not known to have the same shape."))
        else:
            found.append(branch)
    return found, skipped


def _branch(model: Model, before: Mapping[onnx_ir.Node, None], add: onnx_ir.Node) -> Branch | None:
    """None where no layer goes with either operand, or an input would have no reader. `before`: the nodes that the
    outputs need, in the graph's order."""
    candidates = [found for kept in (0, 1) if (found := _without_other(model, before, add, kept)) is not None]
    return max(candidates, key=lambda branch: branch.parameters, default=None)


def _without_other(model: Model, before: Mapping[onnx_ir.Node, None], add: onnx_ir.Node, kept: int) -> Branch | None:
    """What goes when the sum is replaced by its operand at `kept`."""
    graph = model.graph
    after = set(needed_nodes(graph, (add.outputs[0],), [*graph.outputs, required(add, kept)]))
    gone = [node for node in before if node not in after and node is not add]
    stays = {value for node in after for value in read_values(node)} | {required(add, kept)}
    read = dict.fromkeys(value for node in gone for value in read_values(node) if value not in stays)
    if add not in before or not any(not isinstance(linear_of(node), str) for node in gone):
        return None
    if any(value.is_graph_input() and not is_constant(value) for value in read):
        return None
    tensors = {value.name: constant_tensor(value) for value in read}
    sizes = {name: tensor.size for name, tensor in tensors.items() if name and tensor is not None}
    labels = frozenset(label(node) for node in gone)
    return Branch(label(add), add.outputs[0].name or "", kept, labels, frozenset(sizes), sum(sizes.values()))


def without(model: Model, branches: Collection[Branch]) -> Model:
    """A copy whose sums are the operands that stay, each passed on under the sum's name."""
    work = model.clone()
    editor = Editor(work)
    kept = {branch.output: branch.kept for branch in branches}
    for node in list(work.graph):
        if node.outputs and (place := kept.get(node.outputs[0].name or "")) is not None:
            editor.replace(node, [node], [editor.make("Identity", [required(node, place)], f"{label(node)}_passed_on")])
    clean(work)
    return work


def mended(model: Model, branches: Collection[Branch], config: PruneConfig, context: Context) -> Repair:
    """The model without the branches, the layers behind them fitted where the recipe and the data permit.

    Raises ModelNotRunnableError, TimeLimitError.
    """
    changed = without(model, branches)
    found = _fitted(model, changed, branches, config, context)
    work = found.model.clone()
    names = {branch.output for branch in branches}
    for node in list(work.graph):
        if is_op(node, "Identity") and node.outputs[0].name in names:
            Editor.bypass(node, required(node, 0))
    return Repair(work, found.fits, found.skipped, found.warnings)


def _fitted(
    model: Model, changed: Model, branches: Collection[Branch], config: PruneConfig, context: Context
) -> Repair:
    if (left := unrepaired(changed, config, context)) is not None:
        return left
    sums = frozenset(branch.output for branch in branches)
    return repair(model, changed, Changes("The layers behind the cuts", _readers(changed, sums), sums), context)


def _readers(model: Model, names: Collection[str]) -> frozenset[str]:
    """Labels of the layers that these values reach."""
    reached: set[onnx_ir.Value] = set()
    found = set()
    for node in model.graph:
        if reached.intersection(read_values(node)) or any(value.name in names for value in node.outputs):
            reached.update(node.outputs)
            if not isinstance(linear_of(node), str):
                found.add(label(node))
    return frozenset(found)


def prune_blocks(model: Model, config: PruneConfig, context: Context) -> PassResult:
    """Removes branches as the configuration says; the model as it was, and why, where none can go.

    Raises InvalidDataError where the repair needs data and none is given, ModelNotRunnableError, TimeLimitError.
    """
    if config.repair == "least_squares":
        require_data("prune", "repair", config.repair, context)
    context.progress(0.0, "looking for branches")
    branches, skipped = find_branches(model, context.data)
    warnings = [
        *unmatched_excludes(model, config.exclude),
        *unmatched_overrides([branch.id for branch in branches], "branch that can go", config),
    ]
    free = [branch for branch in branches if not _is_excluded(branch, config)]
    skipped += [Skip(branch.id, "Excluded by the recipe.") for branch in branches if branch not in free]
    gone = _chosen(model, free, config, context)
    skipped += [
        Skip(branch.id, "Others change the answers less, for what they cost.") for branch in free if branch not in gone
    ]
    if not gone:
        return PassResult(model, {}, tuple(skipped), (*warnings, _nothing(branches, free, config)))
    repaired = mended(model, gone, config, context)
    context.progress(1.0, "pruned")
    before, after = (sum(tensor.size for tensor in one.tensors()) for one in (model, repaired.model))
    changes: dict[str, int | float] = {
        "blocks_removed": len(gone),
        "parameters_removed_share": 1 - after / max(1, before),
    }
    if repaired.fits:
        changes["layers_repaired"] = len(repaired.fits)
    details: tuple[Mapping[str, str | int | float], ...] = tuple(
        {"block": branch.id, "nodes_removed": len(branch.nodes), "parameters_removed": branch.parameters}
        for branch in gone
    )
    return PassResult(repaired.model, changes, (*skipped, *repaired.skipped), (*warnings, *repaired.warnings), details)


def _is_excluded(branch: Branch, config: PruneConfig) -> bool:
    return any(is_excluded(name, config.exclude) for name in (branch.id, *branch.nodes, *branch.tensors))


def _nothing(branches: Sequence[Branch], free: Sequence[Branch], config: PruneConfig) -> str:
    if not branches:
        why = "the model has no branch beside a skip connection."
    elif not free:
        why = "the recipe excludes every branch."
    else:
        why = f"{config.sparsity:g} of {len(free)} branches is less than half a branch; raise the sparsity."
    return f"Nothing was cut: {why}"


def _chosen(model: Model, branches: Sequence[Branch], config: PruneConfig, context: Context) -> list[Branch]:
    """Those that go, in the graph's order."""
    own = {branch.id: share for branch in branches if (share := override_of([branch.id], config)) is not None}
    ranked = [branch for branch in branches if branch.id not in own]
    count = round(config.sparsity * len(ranked))
    gone = {name for name, share in own.items() if share >= _GOES}
    if count:
        harms = _harms(model, ranked, config, context)
        gone.update(ranked[place].id for place in np.argsort(harms, kind="stable")[:count])
    return [branch for branch in branches if branch.id in gone]


def _harms(model: Model, branches: Sequence[Branch], config: PruneConfig, context: Context) -> list[float]:
    """What each one alone does to the answers, for what goes with it."""
    answers = Answers(model, context)
    costs = list(_costs(model, branches, config, context))
    least = 1e-3 * max(costs, default=0.0) or 1.0
    harms = []
    for number, (branch, cost) in enumerate(zip(branches, costs, strict=True)):
        context.check_time()
        context.progress(_JUDGED * number / len(branches), f"judging the branch before {branch.id}")
        harms.append((1 - answers.kept(without(model, [branch]))) / max(cost, least))
    return harms


def _costs(model: Model, branches: Sequence[Branch], config: PruneConfig, context: Context) -> Iterator[float]:
    """Of each branch, in what the configuration counts."""
    by_node: dict[str, float] = {}
    if config.normalize == "macs":
        by_node = {name: float(count or 0) for name, count in node_macs(model, context).items()}
    elif config.normalize == "latency":
        with context.alone():
            (times,) = node_times_ms([model], context.data, context.work_directory, context.check_time)
        by_node = dict(times)
    for branch in branches:
        if config.normalize == "none":
            yield 1.0
        else:
            yield sum(by_node.get(name, 0.0) for name in branch.nodes) if by_node else float(branch.parameters)
