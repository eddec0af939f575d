"""Figures of single layers for the report: channels of groups, what layers cost before and after, how fits went."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from modelpress_compression.channels import Analysis, Group, Indices
from modelpress_compression.errors import ModelNotRunnableError, UnsupportedOperatorError
from modelpress_compression.graph.read import constant_tensor, label
from modelpress_compression.measure.node_times import NodeTimes, node_times_ms
from modelpress_compression.model import Model
from modelpress_compression.passes.base import Context
from modelpress_compression.passes.prune.channel.costs import node_macs
from modelpress_compression.passes.prune.channel.fitter import Fit
from modelpress_compression.passes.prune.channel.weights import Weights

Row = Mapping[str, str | int | float]


def channels_of(group: Group, kept: Indices) -> tuple[int, int]:
    """Before and after."""
    return group.units * group.align, len(kept) * group.align


def group_rows(analysis: Analysis, kept: Mapping[str, Indices]) -> list[Row]:
    """One for each group that was cut."""
    rows: list[Row] = []
    for name, units in kept.items():
        group = analysis.group(name)
        before, after = channels_of(group, units)
        rows.append({"group": name, "kind": group.kind, "channels": before, "channels_kept": after})
    return rows


def layer_rows(
    model: Model, pruned: Model, analysis: Analysis, kept: Mapping[str, Indices], context: Context
) -> list[Row]:
    """One for each layer whose weight was cut, in the model's order: parameters, MACs, and what `node_times` says.

    What is not known is left out. Raises TimeLimitError.
    """
    parameters = [_parameters(item) for item in (model, pruned)]
    macs = [node_macs(item, context) for item in (model, pruned)]
    times = _times_ms([model, pruned], context)
    rows: list[Row] = []
    for name in _layers(model, analysis, kept):
        row: dict[str, str | int | float] = {"layer": name}
        for key, figures in (("parameters", parameters), ("macs", macs), ("latency_ms", times)):
            before, after = (by_node.get(name) for by_node in figures)
            if before is not None and after is not None:
                row |= {f"{key}_before": before, f"{key}_after": after}
        rows.append(row)
    return rows


def fit_rows(fits: Sequence[Fit]) -> list[Row]:
    """One for each layer that was fitted."""
    return [{"layer": fit.node, "error_before": fit.error_before, "error_after": fit.error_after} for fit in fits]


def _times_ms(models: Sequence[Model], context: Context) -> Sequence[NodeTimes]:
    """None of a model that does not run without onnxruntime's rewriting: the report can do without them."""
    try:
        return node_times_ms(models, context.data, context.work_directory, context.check_time)
    except (ModelNotRunnableError, UnsupportedOperatorError):
        return [{} for _ in models]


def _layers(model: Model, analysis: Analysis, kept: Mapping[str, Indices]) -> list[str]:
    """Labels of the nodes that multiply by a weight that was cut."""
    weights = Weights(model)
    cut = {
        member.node for name in kept for member in analysis.group(name).members if weights.array(member.tensor).ndim > 1
    }
    return list(dict.fromkeys(label(node) for node in model.nodes() if label(node) in cut))


def _parameters(model: Model) -> dict[str, int]:
    """Numbers in the floating-point constants that a node reads, by its label."""
    found = {}
    for node in model.nodes():
        tensors = [constant_tensor(value) for value in node.inputs]
        found[label(node)] = sum(
            tensor.size for tensor in tensors if tensor is not None and tensor.dtype.is_floating_point()
        )
    return found
