"""Which units stay: ranked by importance, each group by itself or all groups in one ranking.

    layer     each group loses `sparsity` of its channels, to the nearest multiple of `round_to`
    global    the least important channels of the model go, wherever they are, until `sparsity` of all are gone

Global ranking divides a unit's importance by what it costs. It takes whole bundles of `round_to` channels, and no group
may fall below half of what `layer` would leave it: a ranking over layers is an estimate, and an empty layer is the end
of a model. An override replaces `sparsity` for its group, and takes it out of the ranking.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from modelpress_compression.channels import Group, Indices
from modelpress_compression.passes.prune.channel.criteria import Scores
from modelpress_compression.passes.prune.channel.limits import Limits


@dataclass(frozen=True)
class Selection:
    """`kept`: rising unit indices by id of the groups that lose some; `raised`: ids that `min_channels` held back."""

    kept: Mapping[str, Indices]
    raised: tuple[str, ...]


def select_by_layer(groups: Sequence[Group], scores: Mapping[str, Scores], limits: Limits) -> Selection:
    """Each group by itself."""
    kept, raised = {}, []
    for group in groups:
        sparsity = limits.sparsity[group.id]
        count = max(limits.nearest(group, sparsity), limits.fewest(group))
        if sparsity and group.align * group.units * (1 - sparsity) < limits.min_channels:
            raised.append(group.id)
        if count < group.units:
            kept[group.id] = largest(scores[group.id], count)
    return Selection(kept, tuple(raised))


def select_globally(
    groups: Sequence[Group],
    scores: Mapping[str, Scores],
    costs: Mapping[str, float],
    sparsity: float,
    limits: Limits,
) -> Selection:
    """All groups whose sparsity is `sparsity` in one ranking; the others, those with an override, each by itself."""
    free = [group for group in groups if limits.sparsity[group.id] == sparsity]
    own = select_by_layer([group for group in groups if limits.sparsity[group.id] != sparsity], scores, limits)
    counts = {group.id: group.units for group in free}
    budget = round(sparsity * sum(group.units * group.align for group in free))
    closed: set[int] = set()
    for _, index, _, units in sorted(_bundles(free, scores, costs, sparsity, limits)):
        group = free[index]
        channels = units * group.align
        # The last bundles go where that comes nearer to the share asked for than leaving them would. What a group
        # keeps is a multiple only while its bundles go in their order.
        if index in closed or channels > 2 * budget:
            closed.add(index)
            continue
        counts[group.id] -= units
        budget -= channels
    kept = {group.id: largest(scores[group.id], counts[group.id]) for group in free if counts[group.id] < group.units}
    return Selection({**own.kept, **kept}, own.raised)


def _bundles(
    groups: Sequence[Group],
    scores: Mapping[str, Scores],
    costs: Mapping[str, float],
    sparsity: float,
    limits: Limits,
) -> list[tuple[float, int, int, int]]:
    """(importance for its cost, group, number in the group, units) of what goes together; rising within a group."""
    bundles = []
    for index, group in enumerate(groups):
        step = limits.step(group)
        least = max(limits.fewest(group), math.ceil(group.units * (1 - sparsity) / 2))
        ordered = np.sort(scores[group.id]) / max(costs[group.id], np.finfo(np.float64).tiny)
        first = group.units % step or step  # brings an odd number of units to a multiple
        start, units = 0, first
        while group.units - start - units >= least:
            bundles.append((float(ordered[start : start + units].mean()), index, start, units))
            start, units = start + units, step
    return bundles


def largest(scores: Scores, count: int) -> NDArray[np.int64]:
    """Indices of the `count` largest, rising; of equal ones the first stay."""
    order = np.argsort(-scores, kind="stable")[:count]
    return np.sort(order).astype(np.int64)
