"""A quantized model in the race, what was measured of it, and which of several to take."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from modelpress_compression.measure.fidelity import Fidelity
from modelpress_compression.measure.latency import Speedup, Times, ratio_interval
from modelpress_compression.pipeline.steps import StepRecord

DRAW = 0.02
SAME_SIZE = 0.01
# What errs at most so much of what the fastest does (3 dB) may be slower by `WORTH`.
CLEARLY_LESS_ERROR = 0.5
WORTH = 0.05


@dataclass(frozen=True)
class Candidate:
    """`reason`: why it was not taken, empty while it is in the race. `variant`: in what it differs from its scheme."""

    scheme: str
    record: StepRecord
    size_bytes: int
    variant: str = ""
    fidelity: Fidelity | None = None
    speedup: Speedup | None = None
    times_s: Times | None = None  # [rounds], those of all who ran in the same rounds
    drop: float | None = None
    reason: str = ""

    @property
    def name(self) -> str:
        """What the report calls it."""
        return f"quantize {self.scheme}" + (f", {self.variant}" if self.variant else "")

    @property
    def cosine(self) -> float:
        """The worst output's; 0 before it was measured."""
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
    """The one to take among those without a reason against them. Draws in latency go to the smallest file; of files as
    small, to within `SAME_SIZE`, to the fastest, unless one is hardly slower and errs clearly less.

    A draw is who is not surely slower than the fastest by more than `DRAW`, in the rounds that both ran.
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
    """Which of the measured candidates no other beats in size, speed and cosine at once."""
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
