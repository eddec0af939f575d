"""A quantized model in the race, what was measured of it, and which of several to take."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from modelpress_compression.measure.fidelity import Fidelity
from modelpress_compression.measure.latency import LatencyRow
from modelpress_compression.pipeline.steps import StepRecord


@dataclass(frozen=True)
class Candidate:
    """`reason`: why it was not taken, empty while it is in the race. `floats`: how many layers stay float32 for it."""

    scheme: str
    record: StepRecord
    size_bytes: int
    floats: int = 0
    fidelity: Fidelity | None = None
    latency: LatencyRow | None = None
    drop: float | None = None
    reason: str = ""

    @property
    def name(self) -> str:
        """What the report calls it."""
        kept = f", {self.floats} layers in float32" if self.floats > 1 else ", 1 layer in float32"
        return f"quantize {self.scheme}{kept if self.floats else ''}"

    @property
    def cosine(self) -> float:
        """The worst output's; 0 before it was measured."""
        if self.fidelity is None:
            return 0.0
        return min((output.cosine for output in self.fidelity.outputs.values() if output.cosine is not None), default=1)

    def to_dict(self, chosen: bool, pareto: bool) -> dict[str, Any]:
        """The row of the report's `candidates`."""
        return {
            "name": self.name,
            "size_bytes": self.size_bytes,
            "speedup": self.latency.to_dict()["speedup"] if self.latency else None,
            "agreement": self.fidelity.agreement if self.fidelity else None,
            "expected_drop": self.fidelity.expected_drop if self.fidelity else None,
            "cosine": self.cosine if self.fidelity else None,
            "drop": self.drop,
            "pareto": pareto,
            "chosen": chosen,
            "reason": self.reason,
        }


def fastest(candidates: Sequence[Candidate]) -> Candidate | None:
    """The one to take among those without a reason against them; draws in latency go to the smallest file."""
    measured = [(item, item.latency) for item in candidates if not item.reason and item.latency is not None]
    if not measured:
        return None
    best = max(latency.speedup.median for _, latency in measured)
    draws = [item for item, latency in measured if latency.speedup.high >= best]
    return min(draws, key=lambda item: item.size_bytes)


def pareto_set(candidates: Sequence[Candidate]) -> list[bool]:
    """Which of the measured candidates no other beats in size, speed and cosine at once."""
    figures = [
        (-item.size_bytes, item.latency.speedup.median, item.cosine) if item.latency is not None else None
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
