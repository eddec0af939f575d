"""What a recipe permits: which groups may be cut, by what share, and which numbers of channels may stay."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from modelpress_compression.channels import Group, Member
from modelpress_compression.passes.base import Skip, is_excluded
from modelpress_compression.passes.prune.config import PruneConfig
from modelpress_compression.passes.prune.overrides import override_of


@dataclass(frozen=True)
class Limits:
    """`sparsity` of each group by its id; channels that stay are a multiple of `round_to`, at least `min_channels`."""

    sparsity: Mapping[str, float]
    round_to: int
    min_channels: int

    @classmethod
    def of(cls, groups: Iterable[Group], config: PruneConfig) -> Limits:
        """Those of a recipe for these groups."""
        return cls({group.id: sparsity_of(group, config) for group in groups}, config.round_to, config.min_channels)

    def step(self, group: Group) -> int:
        """Units that go together, so that the channels that stay are a multiple of `round_to`."""
        return self.round_to // math.gcd(self.round_to, group.align)

    def fewest(self, group: Group) -> int:
        """The fewest units that may stay; all, where rounding leaves no choice."""
        step = self.step(group)
        units = math.ceil(max(1, math.ceil(self.min_channels / group.align)) / step) * step
        return min(group.units, units)

    def nearest(self, group: Group, sparsity: float) -> int:
        """Units that stay for this sparsity: the nearest multiple, fewer in a tie; all units are permitted as well."""
        step = self.step(group)
        wanted = group.units * (1 - sparsity)
        allowed = [*range(step, group.units, step), group.units]
        return int(min(allowed, key=lambda units: (round(abs(units - wanted), 9), units)))


def permitted(groups: Sequence[Group], config: PruneConfig) -> tuple[list[Group], list[Skip]]:
    """Groups none of whose layers the recipe excludes, and a line for each other one.

    A cut changes every layer of its group, those that make the channels and those that read them.
    """
    free, skipped = [], []
    for group in groups:
        hit = next((name for name in _names(group.members) if is_excluded(name, config.exclude)), None)
        if hit is None:
            free.append(group)
        else:
            reason = "Excluded by the recipe." if hit == group.id else f"Excluded by the recipe: it goes with {hit}."
            skipped.append(Skip(group.id, reason))
    return free, skipped


def sparsity_of(group: Group, config: PruneConfig) -> float:
    """The override of the layers that make the group's channels; else `sparsity`."""
    own = override_of(makers(group), config)
    return config.sparsity if own is None else own


def makers(group: Group) -> set[str]:
    """Names of the group and of the layers that make its channels: what an override may match."""
    return {group.id, *_names(member for member in group.members if member.role == "producer")}


def _names(members: Iterable[Member]) -> Iterable[str]:
    for member in members:
        yield member.node
        yield member.tensor
