"""What the report says of a pruning: why channels stay, warnings, and figures of groups and single layers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

from modelpress_compression.channels import Analysis, Group, Indices
from modelpress_compression.errors import ModelNotRunnableError, UnsupportedOperatorError
from modelpress_compression.graph.read import constant_tensor, label
from modelpress_compression.measure.node_times import NodeTimes, node_times_ms
from modelpress_compression.model import Model
from modelpress_compression.passes.base import Context, Skip, unmatched_excludes
from modelpress_compression.passes.prune.channel.costs import node_macs
from modelpress_compression.passes.prune.channel.limits import makers, sparsity_of
from modelpress_compression.passes.prune.channel.ranking import Selection
from modelpress_compression.passes.prune.channel.weights import Weights
from modelpress_compression.passes.prune.config import PruneConfig
from modelpress_compression.passes.prune.overrides import unmatched_overrides
from modelpress_compression.passes.repair.fitter import Fit
from modelpress_compression.passes.repair.least_squares import Repair

Row = Mapping[str, str | int | float]

NOT_REPAIRED = (
    "The layers behind the cuts were not fitted anew: that needs representative inputs, and keeps much of what pruning "
    "costs."
)
_SHOWN = 5  # names in a warning


def unrepaired(cut: Model, config: PruneConfig, context: Context) -> Repair | None:
    """What was cut as it is, where the recipe or the want of data leaves it so; None: it is to be fitted."""
    if config.repair == "none":
        return Repair(cut)
    return None if context.data.provided else Repair(cut, warnings=(NOT_REPAIRED,))


def frozen(analysis: Analysis) -> list[Skip]:
    """Layers whose channels cannot be cut."""
    return [Skip(item.node, item.reason) for item in analysis.frozen]


def whole(groups: Sequence[Group], asked: Selection, selection: Selection, config: PruneConfig) -> list[Skip]:
    """Groups that could lose channels and do not."""
    borne = (
        f"Without the channels asked for, less of the answers would be left than min_cosine = {config.min_cosine:g}."
    )
    return [
        Skip(group.id, borne if group.id in asked.kept else _why_whole(group, config))
        for group in groups
        if group.id not in selection.kept
    ]


def _why_whole(group: Group, config: PruneConfig) -> str:
    channels = group.units * group.align
    if not sparsity_of(group, config):
        return "Its sparsity is 0."
    if config.scope == "global":
        return f"Its {channels} channels are among the more important ones for what they cost, or may not be fewer."
    return (
        f"Of its {channels} channels none can go: those that stay must be a multiple of {config.round_to} and at least "
        f"{config.min_channels}."
    )


def unmatched(model: Model, analysis: Analysis, config: PruneConfig) -> list[str]:
    """Warnings of patterns in the recipe that match nothing."""
    names = set().union(*(makers(group) for group in analysis.groups))
    return [
        *unmatched_excludes(model, config.exclude),
        *unmatched_overrides(names, "layer whose channels can be cut", config),
    ]


def held_back(selection: Selection, config: PruneConfig) -> list[str]:
    """A warning where `min_channels` stood against the sparsity."""
    if not selection.raised:
        return []
    names = ", ".join(selection.raised[:_SHOWN]) + (", ..." if len(selection.raised) > _SHOWN else "")
    return [
        f"The sparsity asked for would leave {len(selection.raised)} layers with fewer than min_channels = "
        f"{config.min_channels} channels ({names}); they keep at least so many."
    ]


def spared(analysis: Analysis, asked: Selection, selection: Selection, share: float, config: PruneConfig) -> list[str]:
    """A warning where the answers did not bear what was asked for: `share` is what would have been left of them."""
    if selection is asked:
        return []
    wanted, gone = (
        sum(
            before - after
            for name, kept in one.kept.items()
            for before, after in [_channels_of(analysis.group(name), kept)]
        )
        for one in (asked, selection)
    )
    return [
        f"Of the {wanted} channels that should go {gone or 'none'} went: without all of them {share:.2f} of the "
        f"answers would be left (cosine of the worst output, or share of the same classes), less than min_cosine = "
        f"{config.min_cosine:g}. More data lets more go, and so does training (preset pruned-distilled)."
    ]


def nothing_cut(analysis: Analysis, groups: Sequence[Group], config: PruneConfig) -> str:
    """The warning of a pass that changed nothing."""
    return f"Nothing was cut: {_why_nothing(analysis, groups, config)}"


def _why_nothing(analysis: Analysis, groups: Sequence[Group], config: PruneConfig) -> str:
    if not analysis.groups:
        reasons = Counter(item.reason for item in analysis.frozen).most_common(1)
        why = f" ({reasons[0][0].rstrip('.')})" if reasons else ""
        return f"the model has no channels that can be cut without changing its inputs or outputs{why}."
    if not groups:
        return "the recipe excludes every layer whose channels could be cut."
    if not any(sparsity_of(group, config) for group in groups):
        return "the sparsity is 0."
    return (
        f"at sparsity {config.sparsity:g} no layer can lose channels, since those that stay must be a multiple of "
        f"round_to = {config.round_to} and at least min_channels = {config.min_channels}; raise the sparsity or lower "
        f"these."
    )


def changes(
    model: Model, repaired: Repair, analysis: Analysis, groups: Sequence[Group], selection: Selection
) -> dict[str, int | float]:
    """Totals of the pass. `groups`: those that the recipe permits to cut."""
    before, after = (sum(tensor.size for tensor in item.tensors()) for item in (model, repaired.model))
    cuts = [_channels_of(analysis.group(name), kept) for name, kept in selection.kept.items()]
    totals: dict[str, int | float] = {
        "groups": len(analysis.groups),
        "groups_cut": len(selection.kept),
        "channels": sum(group.units * group.align for group in groups),
        "channels_removed": sum(channels - left for channels, left in cuts),
        "parameters_removed_share": 1 - after / max(1, before),
    }
    if repaired.fits:
        count = len(repaired.fits)
        totals["layers_repaired"] = count
        totals["repair_error_before"] = sum(fit.error_before for fit in repaired.fits) / count
        totals["repair_error_after"] = sum(fit.error_after for fit in repaired.fits) / count
    return totals


def details(
    model: Model, repaired: Repair, analysis: Analysis, selection: Selection, context: Context
) -> tuple[Row, ...]:
    """Rows of the groups that were cut, of the layers in them before and after, and of the fits. Raises
    TimeLimitError."""
    return (
        *_group_rows(analysis, selection.kept),
        *_layer_rows(model, repaired.model, analysis, selection.kept, context),
        *_fit_rows(repaired.fits),
    )


def _channels_of(group: Group, kept: Indices) -> tuple[int, int]:
    """Before and after."""
    return group.units * group.align, len(kept) * group.align


def _group_rows(analysis: Analysis, kept: Mapping[str, Indices]) -> list[Row]:
    """One for each group that was cut."""
    rows: list[Row] = []
    for name, units in kept.items():
        group = analysis.group(name)
        before, after = _channels_of(group, units)
        rows.append({"group": name, "kind": group.kind, "channels": before, "channels_kept": after})
    return rows


def _layer_rows(
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


def _fit_rows(fits: Sequence[Fit]) -> list[Row]:
    """One for each layer that was fitted."""
    return [{"layer": fit.node, "error_before": fit.error_before, "error_after": fit.error_after} for fit in fits]


def _times_ms(models: Sequence[Model], context: Context) -> Sequence[NodeTimes]:
    """None of a model that does not run without onnxruntime's rewriting: the report can do without them."""
    try:
        with context.alone():
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
