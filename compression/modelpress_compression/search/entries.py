"""A candidate of a goal with the steps that come before its own, and what reports call it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from modelpress_compression.search.candidates import Candidate
from modelpress_compression.search.judge import Judge
from modelpress_compression.search.steps import StepRecord

# What a step before a candidate's own is called in its name; "" where that says nothing.
_BRIEFLY: Mapping[str, Callable[[Any], str]] = MappingProxyType(
    {
        "fuse": lambda config: "",
        "prune": lambda config: f"prune {100 * config.sparsity:.0f} %" if config.sparsity else "prune by prices",
        "factorize": lambda config: f"factorize {100 - 100 * config.budget:.0f} %",
        "distill": lambda config: "distill",
        "quantize": lambda config: f"quantize {config.scheme}",  # where what is in 8 bits was trained
    }
)


@dataclass(frozen=True)
class Entry:
    """A candidate, the steps before its own, and who has judged it."""

    candidate: Candidate
    judge: Judge
    before: tuple[StepRecord, ...] = ()

    @property
    def name(self) -> str:
        steps = [_BRIEFLY[record.step.technique](record.step.config) for record in self.before]
        return ", ".join([*filter(None, steps), self.candidate.name])

    @property
    def is_cut(self) -> bool:
        """Whether a lever has made it: numbers of the model are gone."""
        techniques = {self.candidate.technique, *(record.step.technique for record in self.before)}
        return bool(techniques & {"prune", "factorize"})


def size_change(size_bytes: int, original_bytes: int) -> str:
    """'74 % smaller'."""
    share = 1 - size_bytes / original_bytes
    return f"{abs(share):.0%} {'smaller' if share >= 0 else 'larger'}".replace("%", " %")
