"""Makes a model ready for static quantization: everything that need not be done again for another choice of layers.

1. Choose the layers that can be in 8 bits, with their biases inside                      forms, plan
2. Even out weights, move outliers from activations into weights                          equalize, smooth_quant
3. Observe the activations on the data; layers that meet infinite or NaN values fall out  observers
4. Measure the error that each activation and each weight makes at the outputs, give the
   worst activations better ranges and the worst weights better rounding                  sensitivity, choice, gptq
5. Leave what alone would be a catastrophe in 8 bits, or in float32; measure once more on
   hard samples; find the shifts of means                                                 widening, bias_correction
6. Learn the rounding of weights for all of this, where the recipe asks for it            reconstruction

Steps 4 to 6 map one StaticQuantizer to the next.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial

import numpy as np
import onnx_ir

from modelpress_compression.decibels import decibels
from modelpress_compression.graph.edit import Editor, clean
from modelpress_compression.graph.read import label, required
from modelpress_compression.graph.watch import Listener
from modelpress_compression.mapped import WeightFile
from modelpress_compression.model import Model
from modelpress_compression.passes.base import Context, is_excluded
from modelpress_compression.passes.quantize.config import QuantizeConfig
from modelpress_compression.passes.quantize.dead_ends import dead_ends
from modelpress_compression.passes.quantize.plan import LAYER_OPERATORS, Plan, make_plan, why_not_static
from modelpress_compression.passes.quantize.ranges.choice import (
    improved_weights,
    measure_errors,
    refine,
    start_ranges,
    worst_weights,
)
from modelpress_compression.passes.quantize.ranges.observers import Histogram, observe
from modelpress_compression.passes.quantize.ranges.output_error import (
    DISTANCE_SAMPLES,
    MAX_SAMPLES,
    Distances,
    output_distances,
)
from modelpress_compression.passes.quantize.ranges.sensitivity import SensitivityProbe
from modelpress_compression.passes.quantize.reconstruction.rounders import METHODS, learn_rounding
from modelpress_compression.passes.quantize.report import Findings
from modelpress_compression.passes.quantize.rounding.gptq import make_rounder
from modelpress_compression.passes.quantize.rounding.rounder import RememberingRounder, Rounder
from modelpress_compression.passes.quantize.scaling.equalize import equalize
from modelpress_compression.passes.quantize.scaling.smooth_quant import smooth
from modelpress_compression.passes.quantize.setup import QuantizationSetup
from modelpress_compression.passes.quantize.static.bias_correction import Shifts, mean_shifts
from modelpress_compression.passes.quantize.static.forms import take_in_biases
from modelpress_compression.passes.quantize.static.full_bias_correction import full_shifts
from modelpress_compression.passes.quantize.static.qdq import Parameters
from modelpress_compression.passes.quantize.static.quantizer import StaticQuantizer
from modelpress_compression.passes.quantize.static.widening import (
    ADDS_UP,
    FLOOR_DB,
    probe_of,
    widened_by_the_whole,
    with_wide_weights,
    without_weights,
)

# Far beyond that the gradients did not see what 8 bits do to this model.
_MISLED = 10.0
# Shares of the pass's time until smoothing, calibration, sensitivity and better ranges are done.
_SMOOTHED, _CALIBRATED, _MEASURED, _REFINED = 0.1, 0.45, 0.7, 0.9
# Names in the changes, besides those of operators.
_EQUALIZED, _SMOOTH_QUANT, _GPTQ = "equalize", "smooth_quant", "gptq"

Histograms = Mapping[str, Histogram]


def prepare(
    model: Model, config: QuantizeConfig, context: Context, findings: Findings, *, for_time_alone: bool = False
) -> StaticQuantizer:
    """Works in place. `for_time_alone`: steps 4 and 5, which are for the answers, are left out.

    Raises ModelNotRunnableError if the model does not run on the data, TimeLimitError."""
    take_in_biases(model, config.exclude)
    if config.weights == "int2":
        findings.warnings.append("Static quantization has no products of 2 bits: weights have 4 bits here.")
    layers = _choose(model, config, findings)
    _move_scales(model, layers, config, context, findings)
    plan, histograms = _calibrate(model, layers, context, findings)
    # Weights are rounded as they are now: with the scales that have moved into them.
    # Under auto, layer by layer, by the error at the outputs (see below), once that is known.
    first = replace(config, rounding="nearest") if config.rounding == "auto" else config
    rounder = RememberingRounder(make_rounder(model, first, context, findings), plan.layers)
    setup = QuantizationSetup(model, plan, config, rounder, context)
    quantizer = StaticQuantizer(setup, start_ranges(plan, histograms, config), findings)
    if plan.layers and not for_time_alone:
        quantizer = _with_better_ranges(quantizer, histograms)
        if config.rounding == "auto" and context.data.can_be_fitted:
            quantizer = _with_better_rounding(quantizer)
        quantizer = _without_catastrophes(with_wide_weights(quantizer))
        # What follows is judged by the outputs of the whole model, which random inputs cannot tell.
        if context.data.can_be_fitted:
            quantizer, distances = _for_the_hardest_samples(quantizer, histograms)
            wider = widened_by_the_whole(quantizer)
            quantizer, distances = (wider, _distances(wider)) if wider is not quantizer else (quantizer, distances)
            if config.bias_correction:
                quantizer = _with_corrected_biases(quantizer, distances)
            if config.rounding in METHODS:
                quantizer = _with_learned_rounding(quantizer)
        quantizer = _with_details(quantizer)
    context.progress(_REFINED, "writing 8-bit layers")
    return quantizer


def _choose(model: Model, config: QuantizeConfig, findings: Findings) -> list[onnx_ir.Node]:
    """The layers of the main graph that can be quantized; why the others cannot goes into the findings."""
    chosen, barred = [], dead_ends(model.graph)
    for node in model.nodes():
        if node.op_type not in LAYER_OPERATORS or node.domain or is_excluded(node.name, config.exclude):
            continue
        if node.graph is not model.graph:
            if node.op_type == "Conv":
                findings.skip(node, "it lies inside an If, Loop or Scan, where calibration cannot observe its input")
        elif (reason := why_not_static(node, barred)) is None:
            chosen.append(node)
        elif node.op_type == "Conv":
            findings.skip(node, reason)  # a product's turn comes again with the dynamic rewrites
    return chosen


def _move_scales(
    model: Model, layers: list[onnx_ir.Node], config: QuantizeConfig, context: Context, findings: Findings
) -> None:
    """Equalization and SmoothQuant, in place: the float model answers as before, and is easier to quantize."""
    editor = Editor(model, WeightFile.for_large(model.weight_bytes(), context.work_directory))
    if config.equalize and (count := equalize(model, layers, editor)):
        findings.changes[_EQUALIZED] = count
    if config.smooth_quant and context.data.can_be_fitted and layers:
        context.progress(0.0, "looking for outliers in activations")
        if count := smooth(model, make_plan(model.graph, layers, full=True), editor, context):
            findings.changes[_SMOOTH_QUANT] = count
        clean(model)


def _calibrate(
    model: Model, layers: list[onnx_ir.Node], context: Context, findings: Findings
) -> tuple[Plan, Histograms]:
    """The full plan without layers that touch values which are not finite, and the histograms of its activations."""
    plan = make_plan(model.graph, layers, full=True)
    if not plan.activations:
        return plan, {}
    if not context.data.can_be_fitted:
        findings.warnings.append(
            "Static quantization was calibrated on synthetic inputs, whose ranges need not be those of real ones: give "
            "representative inputs with --data."
        )
    histograms = observe(model, plan.observed(), context, _part(context, _SMOOTHED, _CALIBRATED, "calibrating"))
    broken = {name for name, histogram in histograms.items() if histogram.non_finite or not histogram.total}
    if broken:
        sound = [layer for layer in layers if not _is_broken(layer, broken, histograms, findings)]
        plan = make_plan(model.graph, sound, full=True)
    return plan, histograms


def _is_broken(layer: onnx_ir.Node, broken: set[str], histograms: Histograms, findings: Findings) -> bool:
    """Whether a layer reads or writes one of the `broken` activations, which goes into the findings."""
    touched = [value.name or "" for value in (layer.inputs[0], *layer.outputs) if value is not None]
    bad = next((name for name in touched if name in broken), None)
    if bad is not None:
        what = "infinite or NaN values" if histograms[bad].non_finite else "no values at all"
        findings.skip(layer, f"tensor {bad!r} held {what} during calibration")
    return bad is not None


def _with_better_ranges(quantizer: StaticQuantizer, histograms: Histograms) -> StaticQuantizer:
    """Sensitivity, the error of each activation and each weight; and better ranges for the worst activations."""
    context = quantizer.setup.context
    probe = probe_of(quantizer.setup)
    measuring = _part(context, _CALIBRATED, _MEASURED, "measuring the sensitivity of each layer")
    measured = measure_errors(quantizer.ranges, probe, measuring)
    if measured is None:
        slow = "The sensitivity of single layers was not measured: the model is large, or its runs take long."
        return replace(quantizer, findings=quantizer.findings.plus(Findings(warnings=[slow])))
    refining = _part(context, _MEASURED, _REFINED, "trying other ranges")
    return replace(quantizer, ranges=refine(measured, histograms, probe, refining))


def _with_better_rounding(quantizer: StaticQuantizer) -> StaticQuantizer:
    """GPTQ for the weights that make most of the error, if weights matter at all; kept where it helps."""
    setup, ranges, findings = quantizer.setup, quantizer.ranges, Findings()
    # In 4 bits every weight matters.
    names = list(ranges.weight_errors) if setup.config.is_narrow else worst_weights(ranges)
    chosen = [layer for layer in setup.plan.layers if layer.outputs[0].name in names]
    if not chosen:
        return quantizer
    setup.context.progress(_REFINED, f"rounding the weights of {len(chosen)} layers by GPTQ")
    weights = {required(layer, 1).name or "" for layer in chosen}
    rounder = RememberingRounder(make_rounder(setup.model, setup.config, setup.context, findings, weights), chosen)
    better = improved_weights(ranges, names, probe_of(replace(setup, rounder=rounder)))
    kept = [layer for layer in chosen if layer.outputs[0].name in better]
    if kept:
        findings.changes[_GPTQ] = len(kept)
        setup = replace(setup, rounder=rounder.only(kept))
        ranges = replace(ranges, weight_errors={**ranges.weight_errors, **better})
    return replace(quantizer, setup=setup, ranges=ranges, findings=quantizer.findings.plus(findings))


def _without_catastrophes(quantizer: StaticQuantizer) -> StaticQuantizer:
    """Layers that alone would be a catastrophe stay in float32, from now on."""
    findings, left = Findings(), []
    for layer in quantizer.setup.plan.layers:
        error, name = decibels(quantizer.ranges.error_at(layer)), layer.outputs[0].name or ""
        if error < FLOOR_DB and name not in quantizer.kept_in_float:
            left.append(name)
            findings.skip(layer, f"8 bits here alone would leave the outputs {error:.1f} dB")
    if not left:
        return quantizer
    return replace(quantizer.keeping_in_float(left), findings=quantizer.findings.plus(findings))


def _for_the_hardest_samples(quantizer: StaticQuantizer, histograms: Histograms) -> tuple[StaticQuantizer, Distances]:
    """Ranges that suit the samples with the largest errors too; and the errors of the quantized model.

    If they are larger than those of its parts add up to, the parts were measured on samples that missed something: they
    are measured once more, on the worst samples. The new ranges are kept if the error of the whole model falls.
    """
    distances, setup, ranges = _distances(quantizer), quantizer.setup, quantizer.ranges
    context, judged, predicted = setup.context, distances, ranges.error_of(quantizer.plan)
    if predicted is not None and setup.config.is_narrow:
        # The errors of 4 bits are so large that those of ranges do not show beside them.
        judged = output_distances(setup.model, without_weights(quantizer), context, setup.known)
        predicted -= sum(ranges.weight_errors.get(layer.outputs[0].name or "", 0.0) for layer in quantizer.plan.layers)
    if predicted is None or judged.error <= ADDS_UP * predicted:
        return quantizer, distances
    context.progress(_REFINED, "measuring again on the samples that it errs most on")
    worst = np.argsort(judged.errors)[-MAX_SAMPLES:]
    # Among usual ones, or ranges would be chosen for peaks alone.
    usual = np.arange(0, len(judged.errors), -(-len(judged.errors) // MAX_SAMPLES))
    samples = context.data.spread(DISTANCE_SAMPLES).only(sorted({*worst.tolist(), *usual.tolist()}))
    probe = SensitivityProbe(quantizer.setup, samples, by_trial=judged.error > _MISLED * predicted)
    measured = measure_errors(quantizer.ranges, probe)
    if measured is None:
        return quantizer, distances
    again = replace(quantizer, ranges=refine(measured, histograms, probe))
    closer = _distances(again)
    if closer.error >= distances.error:
        return quantizer, distances
    # Of weights in 4 bits those that are a catastrophe on these samples get 8, before float32 is thought of.
    spared = _without_catastrophes(with_wide_weights(again))
    return spared, closer if spared is again else _distances(spared)


def _with_corrected_biases(quantizer: StaticQuantizer, plain: Distances) -> StaticQuantizer:
    """Biases that take shifts of means back, where the whole model errs by less than `plain` then."""
    quantizer.setup.context.progress(_REFINED, "correcting biases")
    best, least = quantizer, plain.error
    for corrected in (_corrected(quantizer, mean_shifts), _corrected(quantizer, full_shifts)):
        # Means of inner layers are right then, but errors that met before and cancelled out may not any more.
        if (error := _distances(corrected).error) < least:
            best, least = corrected, error
    return best


def _corrected(
    quantizer: StaticQuantizer, shifts_of: Callable[[QuantizationSetup, Parameters], Shifts]
) -> StaticQuantizer:
    plan = quantizer.plan
    shifts = shifts_of(replace(quantizer.setup, plan=plan), quantizer.ranges.on(plan))
    return replace(quantizer, shifts=shifts)


def _with_learned_rounding(quantizer: StaticQuantizer) -> StaticQuantizer:
    """Rounding learned by layers or blocks for the plan as it is now, with the biases that suit it best."""
    setup, findings = quantizer.setup, Findings()
    student = without_weights(quantizer)

    def rounded(rounder: Rounder) -> StaticQuantizer:
        return replace(quantizer, setup=replace(setup, rounder=rounder))

    def plainly(rounder: Rounder) -> StaticQuantizer:
        return replace(rounded(rounder), shifts={})

    def corrected(rounder: Rounder) -> StaticQuantizer:
        return _corrected(rounded(rounder), mean_shifts)

    def fully(rounder: Rounder) -> StaticQuantizer:
        return _corrected(rounded(rounder), full_shifts)

    forms = {"as it is": _once(rounded), "without corrected biases": _once(plainly)}
    if setup.config.bias_correction:
        forms |= {"with biases corrected again": _once(corrected), "and in the order of layers": _once(fully)}
    writes = {name: partial(_written, form) for name, form in forms.items()}
    rounder, best = learn_rounding(setup.model, student, setup.rounder, writes, setup.config, setup.context, findings)
    return replace(forms[best](rounder), findings=quantizer.findings.plus(findings))


def _once(form: Callable[[Rounder], StaticQuantizer]) -> Callable[[Rounder], StaticQuantizer]:
    """The same, done once for each rounder: shifts take a run over the data."""
    made: list[tuple[Rounder, StaticQuantizer]] = []

    def found(rounder: Rounder) -> StaticQuantizer:
        known = next((quantizer for own, quantizer in made if own is rounder), None)
        if known is None:
            known = form(rounder)
            made.append((rounder, known))
        return known

    return found


def _written(form: Callable[[Rounder], StaticQuantizer], rounder: Rounder) -> Model:
    return form(rounder).quantize()[0]


def _with_details(quantizer: StaticQuantizer) -> StaticQuantizer:
    """A row of the report for each layer, where errors were measured."""
    ranges = quantizer.ranges
    if not ranges.weight_errors:
        return quantizer
    rows = Findings()
    for layer in quantizer.setup.plan.layers:
        rows.details.append({"layer": label(layer), "error_db": decibels(ranges.error_at(layer))})
    return replace(quantizer, findings=quantizer.findings.plus(rows))


def _distances(quantizer: StaticQuantizer) -> Distances:
    quantized, _ = quantizer.quantize()
    setup = quantizer.setup
    return output_distances(setup.model, quantized, setup.context, setup.known)


def _part(context: Context, start: float, stop: float, message: str) -> Listener:
    """A listener for a part of the pass: its 0 to 1 is `start` to `stop` of the whole."""
    return lambda share: context.progress(start + (stop - start) * share, message)
