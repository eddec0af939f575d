"""Sparsities of their own, for what goes by a name: which one counts, and which ones match nothing."""

from __future__ import annotations

from collections.abc import Collection

from modelpress_compression.passes.base import is_excluded
from modelpress_compression.passes.prune.config import PruneConfig


def override_of(names: Collection[str], config: PruneConfig) -> float | None:
    """Of what goes by these names, the longest pattern first; None: no pattern matches one of them."""
    hits = [(-len(pattern), sparsity) for pattern, sparsity in config.overrides if _matches(pattern, names)]
    return min(hits)[1] if hits else None


def unmatched_overrides(names: Collection[str], what: str, config: PruneConfig) -> list[str]:
    """A warning for each pattern that matches none of `names`; `what` they are names of, in words."""
    return [
        f"The override {pattern!r} matches no {what}."
        for pattern, _ in config.overrides
        if not _matches(pattern, names)
    ]


def _matches(pattern: str, names: Collection[str]) -> bool:
    return any(is_excluded(name, (pattern,)) for name in names)
