"""Who wins, by rules that are stated: which of theirs a careful user would take, and whether ours is as good.

- A quantized model is acceptable where its task metric falls by at most MAX_DROP. Without a metric: where the cosine of
  its outputs with the float model's is at least MIN_COSINE (10 dB) and, for trained classifiers, the float model by its
  own probabilities expects to lose at most MAX_DROP of its accuracy on the held-out samples. Which class a network with
  random weights names means nothing.
- The best of theirs at a batch size is the fastest acceptable one, or the float model where none is faster than that.
- A result of ours that is not acceptable wins nothing: it counts with the time of the float model.
- Ours is behind where the 95 % interval of (our time / the best's time) lies above 1.
- A regression is ours not acceptable, or slower than float32: the interval of the time ratio lies above 1 and above
  what a second session on the float model itself shows in the same rounds.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from quantization_contenders import BATCH_SIZES, CONTENDERS, OURS, PEERS
from quantization_measuring import CONTROL, FLOAT

MAX_DROP = 0.01
MIN_COSINE = 0.95
Row = Mapping[str, Any]


@dataclass(frozen=True)
class Duel:
    """Ours against the best of theirs on one model at one batch size. `ratio`: our time over the best's.

    `unacceptable`: why our result would not be taken; the times are then those of the float model.
    """

    model: str
    batch_size: int
    best: str
    best_ratio: float
    our_ratio: float
    ratio: Row
    unacceptable: str = ""

    @property
    def behind(self) -> bool:
        return bool(self.ratio["low"] > 1.0)


def drop(model: Row, name: str) -> float | None:
    """How far the task metric of this contender lies below the float model's; None without a metric."""
    before, after = model["contenders"][FLOAT].get("metric"), model["contenders"][name].get("metric")
    return None if before is None or after is None else before - after


def why_not(model: Row, name: str) -> str:
    """Why this contender's model would not be taken; empty where it is acceptable."""
    row = model["contenders"].get(name)
    if row is None:
        return "not run"
    if row["outcome"] != "ok":
        return f"{row['outcome']}: {row['error']}"
    fallen = drop(model, name)
    if fallen is not None:
        # Metrics are printed with four digits: half a unit of the last is no fall.
        return f"the metric falls by {fallen:.3f}" if fallen > MAX_DROP + 5e-5 else ""
    cosine, lost = row["fidelity"]["cosine"], row["fidelity"].get("expected_drop")
    if cosine is None or cosine < MIN_COSINE:
        return f"cosine {cosine}" if cosine is None else f"cosine {cosine:.3f}"
    if model["kind"] != "architecture" and lost is not None and lost > MAX_DROP:
        return f"the expected drop is {lost:.3f}"
    return ""


def duel(name: str, model: Row, batch_size: int) -> Duel | None:
    """None where ours or the batch size was not measured."""
    timed = (model["latency"].get(str(batch_size)) or {}).get("contenders", {})
    if "ratio" not in timed.get(OURS, {}):
        return None
    ratios = {FLOAT: 1.0} | {
        peer.name: timed[peer.name]["ratio"]["median"]
        for peer in PEERS
        if "ratio" in timed.get(peer.name, {}) and not why_not(model, peer.name)
    }
    best = min(ratios, key=lambda peer: ratios[peer])
    if reason := why_not(model, OURS):
        theirs = timed[best]["ratio"] if best != FLOAT else {"median": 1.0, "low": 1.0, "high": 1.0}
        over_best = {"median": 1 / theirs["median"], "low": 1 / theirs["high"], "high": 1 / theirs["low"]}
        return Duel(name, batch_size, best, ratios[best], 1.0, over_best, reason)
    return Duel(name, batch_size, best, ratios[best], timed[OURS]["ratio"]["median"], timed[best]["ours"])


def duels(models: Mapping[str, Row]) -> list[Duel]:
    """All that were measured."""
    found = (duel(name, model, batch_size) for name, model in models.items() for batch_size in BATCH_SIZES)
    return [one for one in found if one is not None]


def regressions(models: Mapping[str, Row]) -> list[str]:
    """One sentence for each."""
    found = []
    for name, model in models.items():
        if reason := why_not(model, OURS):
            found.append(f"{name}: {reason}")
        for batch_size in BATCH_SIZES:
            timed = (model["latency"].get(str(batch_size)) or {}).get("contenders", {})
            ours = timed.get(OURS, {}).get("ratio")
            if ours and ours["low"] > max(1.0, timed[CONTROL]["ratio"]["high"]):
                found.append(f"{name}, batch {batch_size}: {ours['median']:.2f} times the float model's time")
    return found


def geometric_mean(values: Iterable[float]) -> float:
    """NaN of nothing."""
    logarithms = [math.log(value) for value in values]
    return math.exp(sum(logarithms) / len(logarithms)) if logarithms else math.nan


def label(name: str) -> str:
    """As it stands in tables."""
    special = {FLOAT: "float32", CONTROL: "float32, second session"}
    return special.get(name) or CONTENDERS[name].label
