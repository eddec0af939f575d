"""The step around learning: what a scheme would write, what is learned for it, and whether the whole model gains."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace

from modelpress_compression.model import Model
from modelpress_compression.passes.base import Context
from modelpress_compression.passes.quantize.config import QuantizeConfig
from modelpress_compression.passes.quantize.ranges.output_error import output_distances
from modelpress_compression.passes.quantize.reconstruction.grids import GridRecorder, LearnedRounder
from modelpress_compression.passes.quantize.report import Findings
from modelpress_compression.passes.quantize.rounding.rounder import Rounder, weight_name

METHODS = ("adaround", "brecq")
LEARNED_LAYERS = "learned_rounding"  # in the changes: weights whose rounding was learned

# Writes the quantized model with a rounder.
Write = Callable[[Rounder], Model]


def learn_rounding(
    original: Model,
    student: Model,
    base: Rounder,
    writes: Mapping[str, Write],
    config: QuantizeConfig,
    context: Context,
    findings: Findings,
) -> tuple[Rounder, str]:
    """A rounder with learned levels, and the name of the one of `writes` that errs least with it; `base` where none
    errs less than the first of them does with `base`, on samples held out.

    `original`, `student`: as in `learn`. Raises ModelNotRunnableError, TimeLimitError.
    """
    # torch takes a second to import, and only who learns needs it.
    from modelpress_compression.passes.quantize.reconstruction.learn import learn

    first = next(iter(writes))
    recorder = GridRecorder(base)
    writes[first](recorder)
    learned = learn(original, student, recorder.grids, context, config.rounding, config.rounding_steps)
    findings.details.extend(learned.rows)
    users = {weight_name(node): node for node in original.graph if len(node.inputs) > 1}
    for name, reason in learned.reasons.items():
        if name in users:
            findings.skip(users[name], f"its rounding was not learned: {reason}")
    if not learned.levels:
        return base, first
    judging = replace(context, data=learned.held_out)
    rounder = LearnedRounder(base, learned.levels)
    before = output_distances(original, writes[first](base), judging).error
    errors = {name: output_distances(original, write(rounder), judging).error for name, write in writes.items()}
    best = min(errors, key=lambda name: errors[name] if math.isfinite(errors[name]) else math.inf)
    if not errors[best] < before:
        findings.warnings.append(
            f"Rounding {config.rounding!r} was learned and left: on samples held out the outputs err by "
            f"{errors[best]:.3g} of their power with it, and by {before:.3g} without. Give more representative inputs."
        )
        return base, first
    findings.changes[LEARNED_LAYERS] = len(learned.levels)
    return rounder, best
