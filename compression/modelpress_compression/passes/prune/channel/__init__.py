"""Pruning of whole channels, attention heads and hidden units: the model gets smaller and faster on every runtime.

groups      what must be cut together, found in the graph            channels
criterion   how important each unit is                               magnitude, activation, taylor, control
selection   which units stay, at which multiple                      selection, costs, scope
cut         the model without them                                   channels
repair      the layers behind fitted to the uncut model's answers    least_squares, layers, fitter, choice
report      what layers cost before and after                        details, node_times
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType

from modelpress_compression.channels import Analysis, Group, cut, find_groups
from modelpress_compression.errors import InvalidDataError
from modelpress_compression.executor.devices import why_not
from modelpress_compression.model import Model
from modelpress_compression.passes.base import Context, PassResult, Skip
from modelpress_compression.passes.prune.channel.activation import Activation
from modelpress_compression.passes.prune.channel.control import Random
from modelpress_compression.passes.prune.channel.costs import COSTS
from modelpress_compression.passes.prune.channel.criterion import Criterion
from modelpress_compression.passes.prune.channel.details import channels_of, fit_rows, group_rows, layer_rows
from modelpress_compression.passes.prune.channel.least_squares import Repair, repair
from modelpress_compression.passes.prune.channel.magnitude import Magnitude
from modelpress_compression.passes.prune.channel.scope import permitted, sparsity_of, unmatched_overrides
from modelpress_compression.passes.prune.channel.selection import Limits, Selection, select_by_layer, select_globally
from modelpress_compression.passes.prune.config import PruneConfig
from modelpress_compression.passes.prune.targets import unmatched

__all__ = ["CRITERIA", "prune_channels"]


def _taylor(config: PruneConfig) -> Criterion:
    from modelpress_compression.passes.prune.channel.taylor import Taylor  # imports torch, which the others do not need

    return Taylor(config.seed)


CRITERIA: Mapping[str, Callable[[PruneConfig], Criterion]] = MappingProxyType(
    {
        "l1": lambda config: Magnitude(1),
        "l2": lambda config: Magnitude(2),
        "activation": lambda config: Activation(),
        "taylor": _taylor,
        "random": lambda config: Random(config.seed),
    }
)
_SHOWN = 5  # names in a warning
_SHARES = (0.1, 0.3, 0.95)  # of the pass's time until groups are found, units chosen, and layers fitted


def prune_channels(model: Model, config: PruneConfig, context: Context) -> PassResult:
    """Cuts as the configuration says; where nothing can be cut, the model as it was and a warning that says why.

    Raises InvalidDataError where the criterion or the repair needs data and none is given, ModelNotRunnableError,
    TimeLimitError.
    """
    criterion = CRITERIA[config.criterion](config)
    _require_data(criterion, config, context)
    context.progress(0.0, "looking for channels that go together")
    analysis = find_groups(model)
    groups, skipped = permitted(analysis.groups, config)
    skipped = [*(Skip(item.node, item.reason) for item in analysis.frozen), *skipped]
    warnings = _unmatched(model, analysis, config)
    if config.criterion == "taylor" and (reason := why_not(context.target.device)):
        warnings.append(reason)
    context.progress(_SHARES[0], f"judging {len(groups)} groups of channels")
    selection = _select(model, groups, criterion, config, context)
    warnings += _held_back(selection, config)
    skipped += [Skip(group.id, _why_whole(group, config)) for group in groups if group.id not in selection.kept]
    if not selection.kept:
        reason = _why_nothing(analysis, groups, config)
        return PassResult(model, {}, tuple(skipped), (*warnings, f"Nothing was cut: {reason}"))
    context.progress(_SHARES[1], f"cutting {len(selection.kept)} groups of channels")
    pruned = cut(model, selection.kept)
    repaired = Repair(pruned)
    if _repairs(config, context):
        repaired = repair(model, pruned, analysis, selection.kept, _for_repair(context))
        warnings += repaired.warnings
    elif config.repair == "auto":
        warnings.append(
            "The layers behind the cuts were not fitted anew: that needs representative inputs, and keeps much of "
            "what pruning costs."
        )
    context.progress(_SHARES[2], "timing layers")
    details = [
        *group_rows(analysis, selection.kept),
        *layer_rows(model, repaired.model, analysis, selection.kept, context),
        *fit_rows(repaired.fits),
    ]
    context.progress(1.0, "pruned")
    return PassResult(
        repaired.model,
        _changes(model, repaired.model, analysis, selection, repaired),
        (*skipped, *repaired.skipped),
        tuple(warnings),
        tuple(details),
    )


def _require_data(criterion: Criterion, config: PruneConfig, context: Context) -> None:
    if context.data.provided:
        return
    wanting = "criterion" if criterion.needs_data else "repair" if config.repair == "least_squares" else None
    if wanting is not None:
        value = getattr(config, wanting)
        raise InvalidDataError(
            f"prune with {wanting} {value!r} needs representative inputs; give some, or choose another {wanting}."
        )


def _repairs(config: PruneConfig, context: Context) -> bool:
    return context.data.provided and config.repair != "none"


def _for_repair(context: Context) -> Context:
    """For the part of the pass that fits layers."""
    _, start, stop = _SHARES
    return replace(context, progress=lambda share, message: context.progress(start + (stop - start) * share, message))


def _select(
    model: Model, groups: Sequence[Group], criterion: Criterion, config: PruneConfig, context: Context
) -> Selection:
    limits = Limits({group.id: sparsity_of(group, config) for group in groups}, config.round_to, config.min_channels)
    if not any(limits.sparsity.values()):
        return Selection({}, ())
    scores = criterion(model, groups, context)
    if config.scope == "layer":
        return select_by_layer(groups, scores, limits)
    costs = COSTS[config.normalize](model, groups, context)
    return select_globally(groups, scores, costs, config.sparsity, limits)


def _unmatched(model: Model, analysis: Analysis, config: PruneConfig) -> list[str]:
    warnings = [
        f"The exclude pattern {pattern!r} matches no node and no weight."
        for pattern in unmatched(model, config.exclude)
    ]
    return warnings + [
        f"The override {pattern!r} matches no layer whose channels can be cut."
        for pattern in unmatched_overrides(analysis.groups, config)
    ]


def _held_back(selection: Selection, config: PruneConfig) -> list[str]:
    if not selection.raised:
        return []
    names = ", ".join(selection.raised[:_SHOWN]) + (", ..." if len(selection.raised) > _SHOWN else "")
    return [
        f"The sparsity asked for would leave {len(selection.raised)} layers with fewer than min_channels = "
        f"{config.min_channels} channels ({names}); they keep at least so many."
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


def _changes(
    model: Model, pruned: Model, analysis: Analysis, selection: Selection, repaired: Repair
) -> dict[str, int | float]:
    before, after = (sum(tensor.size for tensor in item.tensors()) for item in (model, pruned))
    changes: dict[str, int | float] = {
        "groups": len(analysis.groups),
        "groups_cut": len(selection.kept),
        "channels_removed": sum(
            before - after
            for before, after in (channels_of(analysis.group(name), kept) for name, kept in selection.kept.items())
        ),
        "parameters_removed_share": 1 - after / max(1, before),
    }
    if repaired.fits:
        count = len(repaired.fits)
        changes["layers_repaired"] = count
        changes["repair_error_before"] = sum(fit.error_before for fit in repaired.fits) / count
        changes["repair_error_after"] = sum(fit.error_after for fit in repaired.fits) / count
    return changes
