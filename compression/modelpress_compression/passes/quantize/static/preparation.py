"""Makes a model ready for static quantization: everything that need not be done again for another choice of nodes.

1. Choose the heavy nodes that can be in 8 bits, and lay the widest plan                   plan
2. Even out weights, move outliers from activations into weights                          equalize, smooth_quant
3. Observe the tensors on the data; nodes that meet infinite or NaN values fall out       calibration, observers
4. Measure the error that each tensor and each weight makes at the outputs, give the
   worst tensors better ranges and the worst weights better rounding                      output_error, ranges, gptq
5. Leave what alone would be a catastrophe in float32; find the shifts of means           bias_correction
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import replace

import numpy as np
import onnx_ir

from modelpress_compression.graph.edit import Editor, clean
from modelpress_compression.graph.read import label, required
from modelpress_compression.model import Model
from modelpress_compression.passes.base import Context, is_excluded
from modelpress_compression.passes.quantize.config import QuantizeConfig
from modelpress_compression.passes.quantize.plan import HEAVY, Plan, make_plan, why_not_static
from modelpress_compression.passes.quantize.ranges.calibration import observe
from modelpress_compression.passes.quantize.ranges.choice import (
    improve_weights,
    measure_errors,
    refine,
    start_ranges,
    worst_weights,
)
from modelpress_compression.passes.quantize.ranges.observers import Histogram
from modelpress_compression.passes.quantize.ranges.output_error import (
    DISTANCE_SAMPLES,
    MAX_SAMPLES,
    Distances,
    open_probe,
    output_distances,
)
from modelpress_compression.passes.quantize.report import Findings
from modelpress_compression.passes.quantize.rounding.gptq_rounder import make_rounder
from modelpress_compression.passes.quantize.rounding.rounder import RememberingRounder
from modelpress_compression.passes.quantize.scaling.equalize import equalize
from modelpress_compression.passes.quantize.scaling.smooth_quant import smooth
from modelpress_compression.passes.quantize.static.bias_correction import mean_shifts
from modelpress_compression.passes.quantize.static.quantizer import EQUALIZED, GPTQ, SMOOTHED, StaticQuantizer

# A node that alone takes the outputs below this is a catastrophe, not a compression.
FLOOR_DB = 15.0
# Errors of parts, which are measured on few samples, make up the whole to within so much, or the samples were too few.
_ADDS_UP = 1.5
# Shares of the pass's time until smoothing, calibration, sensitivity and better ranges are done.
_SMOOTHED, _CALIBRATED, _MEASURED, _REFINED = 0.1, 0.45, 0.7, 0.9


def prepare(model: Model, config: QuantizeConfig, context: Context, findings: Findings) -> StaticQuantizer:
    """Works in place. Raises ModelNotRunnableError if the model does not run on the data, TimeLimitError."""
    editor = Editor(model)
    heavy = _choose(model, config, findings)
    if config.equalize and (count := equalize(model, heavy, editor)):
        findings.changes[EQUALIZED] = count
    if config.smooth_quant and context.data.provided and heavy:
        context.progress(0.0, "looking for outliers in activations")
        if count := smooth(model, make_plan(model.graph, heavy, wide=True), editor, context):
            findings.changes[SMOOTHED] = count
        clean(model)
    plan, histograms = _calibrate(model, context, heavy, findings)
    ranges = start_ranges(plan, histograms, config)
    rounder = RememberingRounder(make_rounder(model, config, context, findings), plan.heavy)
    quantizer = StaticQuantizer(
        model,
        config,
        frozenset(node.outputs[0].name or "" for node in plan.heavy),
        ranges,
        findings,
        rounder,
        context.target,
    )
    if plan.heavy:
        _measure(quantizer, plan, histograms, context)
        if config.rounding == "auto" and context.data.provided:
            _round_better(quantizer, plan, context)
        _leave_sensitive(quantizer, plan)
        if context.data.provided:
            _improve(quantizer, plan, histograms, context)
        if ranges.weight_errors:
            findings.details += [
                {"layer": label(node), "error_db": decibels(quantizer.ranges.error_at(node))} for node in plan.heavy
            ]
    context.progress(_REFINED, "writing 8-bit layers")
    return quantizer


def _choose(model: Model, config: QuantizeConfig, findings: Findings) -> list[onnx_ir.Node]:
    """The heavy nodes of the main graph that can be quantized; why the others cannot goes into the findings."""
    chosen = []
    for node in model.nodes():
        if node.op_type not in HEAVY or node.domain or is_excluded(node.name, config.exclude):
            continue
        if node.graph is not model.graph:
            if node.op_type == "Conv":
                findings.skip(node, "it lies inside an If, Loop or Scan, where calibration cannot observe its input")
        elif (reason := why_not_static(node)) is None:
            chosen.append(node)
        elif node.op_type == "Conv":
            findings.skip(node, reason)  # a product's turn comes again with the dynamic rewrites
    return chosen


def _calibrate(
    model: Model, context: Context, heavy: list[onnx_ir.Node], findings: Findings
) -> tuple[Plan, dict[str, Histogram]]:
    """The plan without nodes that touch values which are not finite, and the histograms of its tensors."""
    plan = make_plan(model.graph, heavy, wide=True)
    if not plan.tensors:
        return plan, {}
    if not context.data.provided:
        findings.warnings.append(
            "Static quantization was calibrated on synthetic inputs, whose ranges need not be those of real ones: give "
            "representative inputs with --data."
        )

    def done(share: float) -> None:
        context.progress(_SMOOTHED + (_CALIBRATED - _SMOOTHED) * share, "calibrating")

    histograms = observe(model, plan.observed(), context, done)
    broken = {name for name, histogram in histograms.items() if histogram.non_finite or not histogram.total}
    if broken:
        plan = _without(model, heavy, broken, histograms, findings)
    return plan, histograms


def _without(
    model: Model,
    heavy: list[onnx_ir.Node],
    broken: set[str],
    histograms: Mapping[str, Histogram],
    findings: Findings,
) -> Plan:
    sound = []
    for node in heavy:
        touched = [node.inputs[0], *(output for output in node.outputs)]
        bad = [value.name for value in touched if value is not None and value.name in broken]
        if bad:
            seen = histograms[bad[0] or ""]
            what = "infinite or NaN values" if seen.non_finite else "no values at all"
            findings.skip(node, f"tensor {bad[0]!r} held {what} during calibration")
        else:
            sound.append(node)
    return make_plan(model.graph, sound, wide=True)


def _measure(quantizer: StaticQuantizer, plan: Plan, histograms: Mapping[str, Histogram], context: Context) -> None:
    """Sensitivity, and better ranges."""

    def part(start: float, stop: float, message: str) -> Context:
        return replace(context, progress=lambda share, _: context.progress(start + (stop - start) * share, message))

    config, ranges = quantizer.config, quantizer.ranges
    rounder = quantizer.rounder
    with open_probe(quantizer.model, plan, config, rounder, context) as probe:
        measuring = part(_CALIBRATED, _MEASURED, "measuring the sensitivity of each layer")
        if not measure_errors(ranges, plan, probe, lambda share: measuring.progress(share, "")):
            quantizer.findings.warnings.append(
                "The sensitivity of single layers was not measured: runs of this model take too long."
            )
            return
        refining = part(_MEASURED, _REFINED, "trying other ranges")
        refine(ranges, plan, histograms, config, probe, lambda share: refining.progress(share, ""))


def _improve(quantizer: StaticQuantizer, plan: Plan, histograms: Mapping[str, Histogram], context: Context) -> None:
    """Ranges for the hardest samples, and biases: what the quantized model itself judges, on representative inputs."""
    distances = _look_closer(quantizer, plan, histograms, context)
    if quantizer.config.bias_correction:
        _find_shifts(quantizer, context, distances)


def _round_better(quantizer: StaticQuantizer, plan: Plan, context: Context) -> None:
    """GPTQ for the weights that make most of the error, where weights matter at all; kept where it lessens theirs."""
    names = worst_weights(quantizer.ranges)
    chosen = [node for node in plan.heavy if node.outputs[0].name in names]
    if not chosen:
        return
    context.progress(_REFINED, f"rounding the weights of {len(chosen)} layers by GPTQ")
    weights = {required(node, 1).name or "" for node in chosen}
    inner = make_rounder(quantizer.model, quantizer.config, context, quantizer.findings, weights)
    rounder = RememberingRounder(inner, chosen)
    with open_probe(quantizer.model, plan, quantizer.config, rounder, context) as probe:
        better = improve_weights(quantizer.ranges, names, probe)
    kept = [node for node in chosen if node.outputs[0].name in better]
    if kept:
        quantizer.rounder = rounder.only(kept)
        quantizer.findings.changes[GPTQ] = len(kept)


def _look_closer(
    quantizer: StaticQuantizer, plan: Plan, histograms: Mapping[str, Histogram], context: Context
) -> Distances:
    """What the quantized model errs by.

    Where that is more than its parts tell, the samples that these were measured on missed something: once more, on
    those that the model errs most on.
    """
    distances, floats = _distances(quantizer, context), quantizer.floats
    predicted = quantizer.ranges.error_of(quantizer.plan)
    if predicted is None or distances.error <= _ADDS_UP * predicted:
        return distances
    context.progress(_REFINED, "measuring again on the samples that it errs most on")
    worst = np.argsort(distances.errors)[-MAX_SAMPLES:]
    usual = np.arange(0, len(distances.errors), -(-len(distances.errors) // MAX_SAMPLES))
    samples = context.data.spread(DISTANCE_SAMPLES).only(sorted({*worst.tolist(), *usual.tolist()}))
    with open_probe(quantizer.model, plan, quantizer.config, quantizer.rounder, context, samples) as probe:
        before = deepcopy(quantizer.ranges)
        if not measure_errors(quantizer.ranges, plan, probe):
            return distances
        refine(quantizer.ranges, plan, histograms, quantizer.config, probe)
    again = _distances(quantizer, context)
    if again.error >= distances.error:
        quantizer.ranges = before
        return distances
    _leave_sensitive(quantizer, plan)
    return _distances(quantizer, context) if quantizer.floats != floats else again


def _distances(quantizer: StaticQuantizer, context: Context) -> Distances:
    return output_distances(quantizer.model, quantizer.quantize(frozenset(), Findings()), context)


def _find_shifts(quantizer: StaticQuantizer, context: Context, plain: Distances) -> None:
    context.progress(_REFINED, "correcting biases")
    quantizer.shifts = mean_shifts(
        quantizer.model,
        quantizer.plan,
        quantizer.ranges.on(quantizer.plan),
        quantizer.config,
        quantizer.rounder,
        context,
    )
    if _distances(quantizer, context).error >= plain.error:
        # Means of inner layers are right then, but errors that met before and cancelled out do not any more.
        quantizer.shifts = {}


def _leave_sensitive(quantizer: StaticQuantizer, plan: Plan) -> None:
    """Nodes that alone would be a catastrophe stay float32, from now on."""
    for node in plan.heavy:
        error, name = quantizer.ranges.error_at(node), node.outputs[0].name or ""
        if decibels(error) < FLOOR_DB and name not in quantizer.floats:
            quantizer.floats |= {name}
            quantizer.findings.skip(node, f"8 bits here alone would leave the outputs {decibels(error):.1f} dB")


def decibels(error: float) -> float:
    """A share of the signal's power as a signal-to-noise ratio; held within +-200 dB."""
    if not math.isfinite(error):
        return -200.0
    return min(200.0, -10 * math.log10(error)) if error > 0 else 200.0
