"""What levers fit a cut model to, and what it is judged by.

With labels, or a metric of the user's own, those judge, and all data is fitted to. Without, a third of the data is held
out: repair and training never see it, and what they make is judged on it alone. The rest would say nothing of other
samples: judged by what it had been fitted to, a net for pictures of clothes kept 97 % of its classes with a quarter of
its channels gone, and lost 3.2 points on 10,000 other pictures. How such a judge decides: judge.py, rule 5.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from modelpress_compression.holding_out import parted
from modelpress_compression.inputs import InputData
from modelpress_compression.measure.fidelity import KnownOutputs
from modelpress_compression.memory import key_of
from modelpress_compression.search.judge import Judge

EVERY = 3  # sample is held out
MIN_JUDGING = 30
MIN_SAMPLES = EVERY * MIN_JUDGING


@dataclass(frozen=True)
class Grounds:
    """`data`: what may be fitted to. `judge`: by samples that are not among them, or by labels."""

    data: InputData
    judge: Judge


def grounds(judge: Judge) -> Grounds | None:
    """For what is fitted to the judge's data; None: nothing could tell what it is worth."""
    data = judge.context.data
    if not data.vouches:
        return None
    if judge.task is not None:
        return Grounds(data, judge)
    if not can_hold_out(data):
        return None
    fitted, held = parted(data, EVERY)
    if held.feed_count < MIN_JUDGING:
        return None  # so many of them are alike
    other = replace(
        judge,
        context=replace(judge.context, data=held),
        screens=False,
        known=KnownOutputs(),
        known_few=KnownOutputs(),
        recall=replace(judge.recall, scope=key_of(judge.recall.scope, "held out", EVERY)),
        held_out=True,
    )
    return Grounds(fitted, other)


def can_hold_out(data: InputData) -> bool:
    """Whether there is enough of it to fit to one part and judge by another."""
    return data.vouches and data.feed_count >= MIN_SAMPLES
