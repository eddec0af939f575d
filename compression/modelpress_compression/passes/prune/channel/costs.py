"""What one unit of a group costs: parameters, multiply-accumulates, or time on this machine.

MACs and time belong to nodes. A unit's part of a node's cost is the part of the weight's axis that it owns; a layer's
cost so counts for the channels that it reads and for those that it makes.

Time is marginal: each node is timed in the model and in the same model with half of every group cut, and what the cut
saved is what the channels cost.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType

import numpy as np

from modelpress_compression.channels import Group, cut
from modelpress_compression.graph.macs import count_macs
from modelpress_compression.graph.read import label
from modelpress_compression.graph.shapes import sample_shapes
from modelpress_compression.measure.node_times import node_times_ms
from modelpress_compression.model import Model
from modelpress_compression.passes.base import Context
from modelpress_compression.passes.prune.channel.weights import Weights

Costs = Mapping[str, float]  # of one unit by the group's id
# No layer is free: what a cut does not make faster still costs a little of what the dearest costs.
_LEAST_SHARE = 1e-3


def equal(model: Model, groups: Sequence[Group], context: Context) -> Costs:
    """Every channel counts the same."""
    return {group.id: float(group.align) for group in groups}


def parameters(model: Model, groups: Sequence[Group], context: Context) -> Costs:
    """Numbers that go with a unit."""
    return {group.id: group.parameters_per_unit for group in groups}


def macs(model: Model, groups: Sequence[Group], context: Context) -> Costs:
    """Multiply-accumulates on one sample of the data; parameters where they are not known."""
    by_node = {name: float(count or 0) for name, count in node_macs(model, context).items()}
    return _or_parameters(_of_units(groups, by_node, Weights(model)), groups)


def latency(model: Model, groups: Sequence[Group], context: Context) -> Costs:
    """Milliseconds that a unit costs on this machine, on one thread; parameters where nothing can be measured."""
    half = {group.id: np.arange(0, group.units, 2, dtype=np.int64) for group in groups if group.units > 1}
    models = [model, cut(model, half)]
    with context.alone():
        whole, halved = node_times_ms(models, context.data, context.work_directory, context.check_time)
    saved = {name: max(0.0, 2 * (time_ms - halved.get(name, time_ms))) for name, time_ms in whole.items()}
    return _or_parameters(_of_units(groups, saved, Weights(model)), groups)


COSTS: Mapping[str, Callable[[Model, Sequence[Group], Context], Costs]] = MappingProxyType(
    {"none": equal, "parameters": parameters, "macs": macs, "latency": latency}
)


def _of_units(groups: Sequence[Group], by_node: Mapping[str, float], weights: Weights) -> dict[str, float]:
    """A unit's part of each node whose weight it owns indices of."""
    costs = {}
    for group in groups:
        total = 0.0
        for member in group.members:
            shape = weights.array(member.tensor).shape
            if len(shape) > 1:
                total += by_node.get(member.node, 0.0) * member.indices.shape[1] / shape[member.axis]
        costs[group.id] = total
    return costs


def _or_parameters(costs: dict[str, float], groups: Sequence[Group]) -> Costs:
    dearest = max(costs.values(), default=0.0)
    if dearest <= 0:
        return {group.id: group.parameters_per_unit for group in groups}
    return {name: max(cost, _LEAST_SHARE * dearest) for name, cost in costs.items()}


def node_macs(model: Model, context: Context) -> dict[str, int | None]:
    """Multiply-accumulates of each node by its label, on one sample of the data; None where they are not known."""
    by_output = count_macs(model, sample_shapes(context.data)).by_output
    return {label(node): by_output.get(node.outputs[0].name or "") for node in model.nodes() if node.outputs}
