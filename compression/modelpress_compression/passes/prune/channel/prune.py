"""The pass, step by step: find what goes together, judge it, choose, cut, repair, and measure the layers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType

from modelpress_compression.channels import Analysis, Group, cut, find_groups
from modelpress_compression.model import Model
from modelpress_compression.passes.base import Context, PassResult, require_data
from modelpress_compression.passes.prune.channel import report
from modelpress_compression.passes.prune.channel.activation import ActivationMagnitude
from modelpress_compression.passes.prune.channel.bearable import bearable
from modelpress_compression.passes.prune.channel.budget import Budget, budget_of
from modelpress_compression.passes.prune.channel.costs import COSTS
from modelpress_compression.passes.prune.channel.criteria import Criterion, Magnitude, Random, Scores
from modelpress_compression.passes.prune.channel.limits import Limits, permitted
from modelpress_compression.passes.prune.channel.ranking import Selection, select_by_layer, select_globally
from modelpress_compression.passes.prune.channel.weights import kept_indices
from modelpress_compression.passes.prune.config import PruneConfig
from modelpress_compression.passes.repair.least_squares import Changes, Repair, repair


def _taylor(config: PruneConfig) -> Criterion:
    from modelpress_compression.passes.prune.channel.taylor import Taylor  # imports torch, which the others do not need

    return Taylor(config.seed)


CRITERIA: Mapping[str, Callable[[PruneConfig], Criterion]] = MappingProxyType(
    {
        "l1": lambda config: Magnitude(1),
        "l2": lambda config: Magnitude(2),
        "activation": lambda config: ActivationMagnitude(),
        "taylor": _taylor,
        "random": lambda config: Random(config.seed),
    }
)
# Shares of the pass's time that have gone by when groups are found, units chosen, and layers fitted.
_FOUND, _CHOSEN, _FITTED = 0.1, 0.3, 0.95


def prune_channels(model: Model, config: PruneConfig, context: Context) -> PassResult:
    """Cuts as the configuration says; where nothing can be cut, the model as it was and a warning that says why.

    Raises InvalidDataError where the criterion or the repair needs data and none is given, ModelNotRunnableError,
    TimeLimitError.
    """
    criterion = CRITERIA[_criterion_name(config, context)](config)
    _require_data(criterion, config, context)

    context.progress(0.0, "looking for channels that go together")
    analysis = find_groups(model)
    groups, excluded = permitted(analysis.groups, config)

    context.progress(_FOUND, f"judging {len(groups)} groups of channels")
    budget = budget_of(model, config, context)
    scores = _scores(model, groups, criterion, config, context)
    asked = _select(model, groups, scores, config, budget, context)
    warnings = (
        *report.unmatched(model, analysis, config),
        *_device_warnings(config, context),
        *report.held_back(asked, config),
    )
    if not asked.kept:
        skipped = (*report.frozen(analysis), *excluded, *report.whole(groups, asked, asked, config))
        return PassResult(model, {}, skipped, (*warnings, report.nothing_cut(analysis, groups, config)))

    context.progress(_CHOSEN, f"cutting {len(asked.kept)} groups of channels")

    def repaired_after(selection: Selection) -> Repair:
        return refitted(model, cut(model, selection.kept), analysis, selection, config, context)

    if config.min_cosine:
        limits = Limits.of(groups, config)
        found = bearable(model, groups, scores, asked, limits, config.min_cosine, repaired_after, context)
        selection, repaired = found.selection, found.repaired
        warnings = (*warnings, *report.spared(analysis, asked, selection, found.share, config))
    else:
        selection, repaired = asked, repaired_after(asked)
    skipped = (*report.frozen(analysis), *excluded, *report.whole(groups, asked, selection, config))
    if not selection.kept:
        return PassResult(model, {}, skipped, warnings)
    gone = budget.gone(selection) if budget is not None else 0.0
    warnings = (*warnings, *(budget.warnings(gone) if budget is not None else ()))

    context.progress(_FITTED, "timing layers")
    details = report.details(model, repaired, analysis, selection, context)
    context.progress(1.0, "pruned")
    changes = report.changes(model, repaired, analysis, groups, selection)
    if budget is not None and budget.unit == "macs":
        changes["macs_removed_share"] = gone
    return PassResult(
        repaired.model,
        changes,
        (*skipped, *repaired.skipped),
        (*warnings, *repaired.warnings),
        details,
    )


def _criterion_name(config: PruneConfig, context: Context) -> str:
    """The criterion that the configuration stands for.

    Of those that read data, `auto` takes the one whose cuts keep most on trained networks at the cost of one run
    (docs/pruning_quality.md).
    """
    if config.criterion != "auto":
        return config.criterion
    return "activation" if context.data.provided else "l2"


def _require_data(criterion: Criterion, config: PruneConfig, context: Context) -> None:
    """A recipe that asks by name for what needs data is refused; `auto` does without."""
    if criterion.needs_data:
        require_data("prune", "criterion", config.criterion, context)
    if config.repair == "least_squares":
        require_data("prune", "repair", config.repair, context)


def _scores(
    model: Model, groups: Sequence[Group], criterion: Criterion, config: PruneConfig, context: Context
) -> Mapping[str, Scores]:
    """Of the units of each group; of none where nothing shall go: the criterion would run the model for nothing."""
    return criterion(model, groups, context) if any(Limits.of(groups, config).sparsity.values()) else {}


def _select(
    model: Model,
    groups: Sequence[Group],
    scores: Mapping[str, Scores],
    config: PruneConfig,
    budget: Budget | None,
    context: Context,
) -> Selection:
    """Which units stay. `budget`: what the sparsity is a share of; None: of the channels."""
    if not scores:
        return Selection({}, ())
    costs = COSTS[config.normalize](model, groups, context) if config.scope == "global" else {}

    def selected(sparsity: float) -> Selection:
        limits = Limits.of(groups, replace(config, sparsity=sparsity))
        if config.scope == "layer":
            return select_by_layer(groups, scores, limits)
        return select_globally(groups, scores, costs, sparsity, limits)

    return selected(config.sparsity) if budget is None else budget.nearest(selected)


def _device_warnings(config: PruneConfig, context: Context) -> tuple[str, ...]:
    """Why gradients ran on another device than the recipe asks for."""
    if config.criterion != "taylor":
        return ()
    from modelpress_compression.executor import device_warning  # torch, see above

    return (reason,) if (reason := device_warning(context.target.device)) else ()


def refitted(
    model: Model, pruned: Model, analysis: Analysis, selection: Selection, config: PruneConfig, context: Context
) -> Repair:
    """The cut model with its layers fitted, or as it is where the recipe or the want of data says so."""
    if (left := report.unrepaired(pruned, config, context)) is not None:
        return left

    def progress(share: float, message: str) -> None:
        context.progress(_CHOSEN + (_FITTED - _CHOSEN) * share, message)

    return repair(model, pruned, _changes(analysis, selection), replace(context, progress=progress))


def _changes(analysis: Analysis, selection: Selection) -> Changes:
    """What the cuts changed, and which nodes read channels of the groups that were cut."""
    groups = {group.id: group for group in analysis.groups}
    masks = kept_indices(groups, selection.kept)
    members = (member for name in selection.kept for member in groups[name].members)
    readers = frozenset(member.node for member in members if member.role == "consumer")
    return Changes("The layers behind the cuts", readers, frozenset(tensor for tensor, _ in masks), masks)
