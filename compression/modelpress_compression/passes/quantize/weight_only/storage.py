"""All weights in fewer bits, computing in float32 as before: what a model gets where nothing faster keeps its answers.

Each weight is stored in 8 bits with a scale a channel, depthwise convolutions and stems included. Where the outputs
would err by more than permitted, the weights that make most of the error are stored in float16 instead:

    error of one weight   squared distance of the outputs with that weight alone in 8 bits, over the outputs' power
    order                 the largest error first, until the errors of those left in 8 bits add up to no more than is
                          permitted (roundings of different weights are independent, so that their errors add)
    proof                 the model so made is compared with the original; while it errs too much, a quarter more go

Errors of single weights are measured in one session, whose weights are inputs with defaults: a run is given one of them
rounded. Only models that need it pay for it: most keep 35 to 50 dB with all weights in 8 bits.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from modelpress_compression.graph.edit import Editor, clean
from modelpress_compression.graph.read import constant_array
from modelpress_compression.model import Model
from modelpress_compression.passes.base import Context, PassResult
from modelpress_compression.passes.quantize.config import QuantizeConfig
from modelpress_compression.passes.quantize.ranges.output_error import (
    counted_outputs,
    output_distances,
    power,
    squared_distance,
    without_softmax,
)
from modelpress_compression.passes.quantize.report import Findings
from modelpress_compression.passes.quantize.rounding.rounder import NearestRounder
from modelpress_compression.passes.quantize.weight_only.store import STORED, storable_weights
from modelpress_compression.passes.quantize.weight_only.writer import WeightWriter, rounded_to_8_bits
from modelpress_compression.passes.quantize.weights import why_not_float16
from modelpress_compression.runtime import run, run_all, session_of

IN_FLOAT16 = "float16_weights"  # in the changes
# Feeds on which the error of single weights is measured: it varies little from one to the next.
PROBE_SAMPLES = 4
_GROWTH = 1.25


def store_all(model: Model, config: QuantizeConfig, context: Context, floor_db: float) -> PassResult:
    """A clone with all weights in 8 bits or float16, whose outputs keep `floor_db` on the context's data.

    The model as it was where not even float16 keeps that, with the reason. Raises ModelNotRunnableError,
    TimeLimitError.
    """
    permitted = 10 ** (-floor_db / 10)
    halves: set[str] = set()
    result = _stored(model, config, halves)
    error = _error(model, result, context)
    order: list[str] = []
    while error > permitted:
        context.check_time()
        if not order:
            errors = _errors_of_weights(model, config, context)
            order = sorted(errors, key=lambda name: -errors[name])
            count = _fewest(order, errors, permitted)
        elif len(halves) == len(order):
            reason = f"stored in float16 its outputs keep {-10 * math.log10(error):.1f} dB alone"
            return PassResult(model, warnings=(f"Weights stay in float32: {reason}.",))
        else:
            count = min(math.ceil(_GROWTH * len(halves)) + 1, len(order))
        halves = set(order[:count])
        result = _stored(model, config, halves)
        error = _error(model, result, context)
    return result


def _stored(model: Model, config: QuantizeConfig, halves: Collection[str]) -> PassResult:
    """All weights that can be are stored, those of the names `halves` in float16."""
    work, findings = model.clone(), Findings()
    writer = WeightWriter(Editor(work), replace(config, weights="int8"), NearestRounder(), folded=True)
    for graph, weight in list(storable_weights(work, config)):
        if weight.name not in halves:
            writer.store(graph, weight)
            findings.changes[STORED] += 1
        elif why_not_float16(np.asarray(constant_array(weight), np.float32)) is None:
            writer.store_half(graph, weight)
            findings.changes[IN_FLOAT16] += 1
    clean(work)
    return findings.result(work)


def _error(model: Model, result: PassResult, context: Context) -> float:
    """As a share of the outputs' power."""
    return output_distances(model, result.model, context).error if result.changed else 0.0


def _fewest(order: list[str], errors: Mapping[str, float], permitted: float) -> int:
    """How many of the first must go, so that the errors of the rest add up to what is permitted; one at least."""
    left = sum(errors.values())
    for count, name in enumerate(order, start=1):
        left -= errors[name]
        if left <= permitted:
            return count
    return len(order)


def _errors_of_weights(model: Model, config: QuantizeConfig, context: Context) -> dict[str, float]:
    """By the name of each weight of the main graph: the error at the outputs with it alone in 8 bits."""
    probe = without_softmax(model)
    rounded: dict[str, NDArray[np.float32]] = {}
    for graph, weight in storable_weights(probe, config):
        if graph is probe.graph and weight.is_initializer() and weight.name:
            rounded[weight.name] = rounded_to_8_bits(weight, config)
    # Inputs with default values, of which a run is given one; as inputs they are no constants, so only now.
    probe.graph.inputs.extend(probe.graph.initializers[name] for name in rounded)
    errors = dict.fromkeys(rounded, 0.0)
    signal = 0.0
    with session_of(probe) as session:
        for feed in context.data.spread(PROBE_SAMPLES).feeds(batch_size=1):
            exact = counted_outputs(run(session, feed), feed)
            signal += power(exact)
            runs = run_all(session, (feed | {name: array} for name, array in rounded.items()))
            for name, changed in zip(rounded, runs, strict=True):
                context.check_time()
                errors[name] += squared_distance(exact, counted_outputs(changed, feed))
    return {name: error / signal if signal else 0.0 for name, error in errors.items()}
