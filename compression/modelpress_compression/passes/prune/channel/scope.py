"""Which groups may be cut, and by how much: the recipe's `exclude` and `overrides` applied to the groups of a model."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from modelpress_compression.channels import Group, Member
from modelpress_compression.passes.base import Skip, is_excluded
from modelpress_compression.passes.prune.config import PruneConfig


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
    """The override of the layers that make the group's channels, the longest pattern first; else `sparsity`."""
    names = {group.id, *_names(member for member in group.members if member.role == "producer")}
    hits = [
        (-len(pattern), sparsity)
        for pattern, sparsity in config.overrides
        if any(is_excluded(name, (pattern,)) for name in names)
    ]
    return min(hits)[1] if hits else config.sparsity


def unmatched_overrides(groups: Iterable[Group], config: PruneConfig) -> list[str]:
    """Patterns of `overrides` that name no layer whose channels can be cut."""
    names = {
        name
        for group in groups
        for name in (group.id, *_names(member for member in group.members if member.role == "producer"))
    }
    return [pattern for pattern, _ in config.overrides if not any(is_excluded(name, (pattern,)) for name in names)]


def _names(members: Iterable[Member]) -> Iterable[str]:
    for member in members:
        yield member.node
        yield member.tensor
