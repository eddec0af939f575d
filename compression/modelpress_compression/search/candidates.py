"""A candidate of `auto` with its figures, and which of several candidates to take."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from modelpress_compression.measure.fidelity import Fidelity
from modelpress_compression.measure.latency import Speedup, Times, ratio_interval
from modelpress_compression.search.steps import StepRecord

# Speeds and sizes that differ by less count as equal.
DRAW = 0.02
SAME_SIZE = 0.01
# A candidate with at most half the error of the fastest (3 dB) may be 5 % slower.
CLEARLY_LESS_ERROR = 0.5
WORTH = 0.05


@dataclass(frozen=True)
class Candidate:
    """`reason`: why it was not taken, empty while it may be. `variant`: how it differs from the plain scheme, if it
    does. `times_s`: [rounds], measured in turn with the other candidates. `unproven`: only data that vouches for its
    ranges is missing. `screened`: its answers were judged on a few samples alone; `remembered`: by an earlier job.
    `unscored`: only the score of who computes the metric is missing. `draft`: builds and judges it in full; what is
    there until then has its size and its times alone. `closer`: builds and judges the next one that stores its weights
    with less error, for where all samples refuse this one; None of that: there is none. `computes_as`: the file of the
    model whose arithmetic it has, where its weights are only stored otherwise and are the same once it is loaded."""

    scheme: str
    record: StepRecord
    size_bytes: int
    variant: str = ""
    fidelity: Fidelity | None = None
    speedup: Speedup | None = None
    times_s: Times | None = None
    drop: float | None = None
    reason: str = ""
    technique: str = "quantize"
    unproven: bool = False
    screened: bool = False
    unscored: bool = False
    remembered: bool = False
    draft: Callable[[], Candidate] | None = None
    closer: Callable[[], Candidate | None] | None = None
    computes_as: Path | None = None

    @property
    def name(self) -> str:
        """Its name in the report."""
        plain = f"{self.technique} {self.scheme}".strip()
        return plain + (f", {self.variant}" if self.variant else "")

    @property
    def computes_in_8_bits(self) -> bool:
        """Whether activations are rounded too, whose range the data must show."""
        return self.technique == "quantize" and (self.scheme in ("dynamic", "static") or "blocks" in self.variant)

    @property
    def is_fitted(self) -> bool:
        """Whether its ranges, or the levels of its weights, were chosen by the data."""
        return self.technique == "quantize" and (self.scheme == "static" or "blocks" in self.variant)

    @property
    def cosine(self) -> float:
        """That of the worst output; 0 before it was measured."""
        if self.fidelity is None:
            return 0.0
        return self.fidelity.cosine

    def to_dict(self, chosen: bool, pareto: bool) -> dict[str, Any]:
        """The row of the report's `candidates`."""
        return {
            "name": self.name,
            "size_bytes": self.size_bytes,
            "speedup": asdict(self.speedup) if self.speedup else None,
            "agreement": self.fidelity.agreement if self.fidelity else None,
            "expected_drop": self.fidelity.expected_drop if self.fidelity else None,
            "cosine": self.cosine if self.fidelity else None,
            "drop": self.drop,
            "pareto": pareto,
            "chosen": chosen,
            "reason": self.reason,
        }


def fastest(candidates: Sequence[Candidate]) -> Candidate | None:
    """The candidate to take; None where there is a reason against each.

    Candidates tie with the fastest unless they are slower by more than `DRAW`, at 95 % confidence, in the rounds that
    both ran. Of those that tie, the smallest file wins; of files of the same size, to within `SAME_SIZE`, the fastest.
    A candidate of that size that is little slower (`WORTH`) and has much less error (`CLEARLY_LESS_ERROR`) is preferred
    to it.
    """
    racers = [(item, item.times_s) for item in candidates if not item.reason and item.times_s is not None]
    if not racers:
        return None
    racers.sort(key=lambda racer: float(np.median(racer[1])))
    best = racers[0][1]
    speeds = [(item, ratio_interval(best / times_s)) for item, times_s in racers]
    draws = [item for item, speed in speeds if speed.high >= 1 - DRAW]
    most = min(item.size_bytes for item in draws) * (1 + SAME_SIZE)
    quickest = next(item for item in draws if item.size_bytes <= most)
    closer = [
        item
        for item, speed in speeds
        if speed.median >= 1 - WORTH
        and item.size_bytes <= most
        and 1 - item.cosine <= CLEARLY_LESS_ERROR * (1 - quickest.cosine)
        and (item.drop or 0) <= (quickest.drop or 0)
    ]
    return max(closer, key=lambda item: item.cosine, default=quickest)


def pareto_set(candidates: Sequence[Candidate]) -> list[bool]:
    """For each candidate whether it was measured and no other is at least as good in size, speed and cosine."""
    figures = [
        (-item.size_bytes, item.speedup.median, item.cosine) if item.speedup is not None else None
        for item in candidates
    ]
    return [
        mine is not None
        and not any(
            other is not None and other != mine and all(b >= a for a, b in zip(mine, other, strict=True))
            for other in figures
        )
        for mine in figures
    ]
