"""What each width of each group of channels errs at the outputs, with that group alone narrowed and repaired; and what
a model errs without one of its branches.

Widths are measured at a few shares, and lie on a power law between and beside them. Which units go is what `prune`
decides. Errors are squared ones, which add up over groups; how far a cut of all of them together may go is measured by
the answers that are kept, in another unit (passes/prune/channel/bearable.py).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from modelpress_compression.channels import Group, cut, find_groups
from modelpress_compression.measure.fidelity import KnownOutputs
from modelpress_compression.model import Model
from modelpress_compression.passes.base import Context
from modelpress_compression.passes.prune.blocks import Branch, mended
from modelpress_compression.passes.prune.channel.limits import Limits
from modelpress_compression.passes.prune.channel.prune import CRITERIA, refitted
from modelpress_compression.passes.prune.channel.ranking import select_by_layer
from modelpress_compression.passes.prune.channel.weights import Weights
from modelpress_compression.passes.prune.config import PruneConfig
from modelpress_compression.passes.quantize.ranges.output_error import output_distances

MEASURED = (0.25, 0.5, 0.75)
SHARES = (0.125, 0.25, 0.375, 0.5, 0.625, 0.75, 0.875)  # of a group's units, that may go
SAMPLES = 64
LIMIT_S = 180.0  # what would take longer in all is not measured
_EXACT = 1e-12


def width_errors(model: Model, config: PruneConfig, context: Context) -> dict[str, dict[float, float]]:
    """By the group's id, the error of each share that may go from it, chosen by the criterion of `config`; empty:
    measuring them would take too long.

    Raises ModelNotRunnableError, TimeLimitError, and UnsupportedOperatorError where a criterion needs gradients.
    """
    analysis = find_groups(model)
    few = Context(context.data.spread(SAMPLES), context.work_directory, context.deadline, context.clock)
    scores = CRITERIA[config.criterion](config)(model, analysis.groups, few)
    known = KnownOutputs()
    found: dict[str, dict[float, float]] = {}
    began = context.clock()
    for number, group in enumerate(analysis.groups):
        if number and (context.clock() - began) / number * len(analysis.groups) > LIMIT_S:
            context.log("the widths of channels have no prices: measuring them would take too long")
            return {}
        context.progress(number / len(analysis.groups), f"weighing the width of {group.id}")
        measured: dict[float, float] = {}
        for share in MEASURED:
            context.check_time()
            limits = Limits({group.id: share}, config.round_to, config.min_channels)
            selection = select_by_layer([group], scores, limits)
            if group.id not in selection.kept:
                continue
            gone = 1 - len(selection.kept[group.id]) / group.units
            if gone not in measured:
                narrow = refitted(model, cut(model, selection.kept), analysis, selection, config, few).model
                measured[gone] = output_distances(model, narrow, few, known).error
        found[group.id] = _between(group, measured, config)
    return found


def _between(group: Group, measured: Mapping[float, float], config: PruneConfig) -> dict[float, float]:
    """The errors of all shares that rounding permits, by the measured ones."""
    if not measured:
        return {}
    limits = Limits({group.id: 0.0}, config.round_to, config.min_channels)
    kept = {max(limits.nearest(group, share), limits.fewest(group)) for share in SHARES}
    shares = sorted(1 - units / group.units for units in kept if units < group.units)
    x = np.log(sorted(measured))
    # Repair can make up for more where more goes, by chance: a deeper cut never counts as the better one.
    y = np.maximum.accumulate(np.log([max(measured[share], _EXACT) for share in sorted(measured)]))
    slopes = np.maximum(np.diff(y) / np.diff(x), 1.0) if len(x) > 1 else np.array([2.0])
    errors = {}
    for share in shares:
        at = np.log(share)
        beside = slopes[0] * min(0.0, at - x[0]) + max(2.0, slopes[-1]) * max(0.0, at - x[-1])
        errors[share] = float(np.exp(np.interp(at, x, y) + beside))
    return errors


def branch_errors(model: Model, branches: Sequence[Branch], config: PruneConfig, context: Context) -> list[float]:
    """Of each branch, the error with it alone gone; repaired, unless that would take too long.

    Raises ModelNotRunnableError, TimeLimitError.
    """
    few = Context(context.data.spread(SAMPLES), context.work_directory, context.deadline, context.clock)
    known = KnownOutputs()
    errors: list[float] = []
    began = context.clock()
    for number, branch in enumerate(branches):
        context.check_time()
        context.progress(number / len(branches), f"weighing the branch before {branch.id}")
        if number == 1 and config.repair != "none" and (context.clock() - began) * len(branches) > LIMIT_S:
            context.log("branches are weighed without repair, which would take too long")
            return branch_errors(model, branches, replace(config, repair="none"), context)
        errors.append(output_distances(model, mended(model, [branch], config, few).model, few, known).error)
    return errors


def owned_axes(
    model: Model, groups: Sequence[Group], tensor: str, branches: Sequence[Branch] = ()
) -> list[dict[int, float]]:
    """Of each axis of a weight, the share that each group owns, by the group's place.

    Then an axis for each branch that it goes with, of which that owns all; branches have the places behind the groups.
    """
    extents = Weights(model).array(tensor).shape
    axes: list[dict[int, float]] = [{} for _ in extents]
    for number, group in enumerate(groups):
        for member in group.members:
            if member.tensor == tensor:
                axes[member.axis][number] = member.indices.size / extents[member.axis]
    gone_with = [number for number, branch in enumerate(branches, start=len(groups)) if tensor in branch.tensors]
    return [*axes, *({number: 1.0} for number in gone_with)]
