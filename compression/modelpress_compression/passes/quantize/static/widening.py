"""Which weights have 8 bits where the others have 4: those that 4 bits cost most, layer by layer and then as a whole.

Published results of 4-bit weights keep the first and the last layer in 8 bits. Which layers those are in a given model
is measured: by the error at the outputs that each makes alone, first; then by what is left of the outputs of the whole.
Neither tells of classes that no sample shows: their heads have 8 bits in any case.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import onnx_ir

from modelpress_compression.counted import counted
from modelpress_compression.decibels import decibels, power_share
from modelpress_compression.graph.edit import Editor
from modelpress_compression.graph.heads import unvouched_heads
from modelpress_compression.graph.read import required
from modelpress_compression.model import Model
from modelpress_compression.passes.hessians import held_out_samples
from modelpress_compression.passes.quantize.ranges.output_error import (
    MAX_SAMPLES,
    Distances,
    Trial,
    output_distances,
    share,
)
from modelpress_compression.passes.quantize.ranges.sensitivity import SensitivityProbe
from modelpress_compression.passes.quantize.report import Findings
from modelpress_compression.passes.quantize.rounding.rounder import NearestRounder
from modelpress_compression.passes.quantize.setup import QuantizationSetup
from modelpress_compression.passes.quantize.static.forms import guard_float_nodes
from modelpress_compression.passes.quantize.static.qdq import QdqWriter
from modelpress_compression.passes.quantize.static.quantizer import StaticQuantizer
from modelpress_compression.passes.quantize.weights import WeightStore

# A layer that alone takes the outputs below this is a catastrophe, not a compression.
FLOOR_DB = 15.0
# What weights in 4 bits may take the outputs to, all together.
NARROW_DB = 20.0
_ALLOWED = power_share(NARROW_DB)
# The errors of parts add up, if the whole errs by no more than this times their sum.
ADDS_UP = 1.5
# How often the whole is looked at, and the least share of the budget that one look leaves.
_WIDENINGS = 4
_MOST_AT_ONCE = 0.2
_FEW_SHOWN = (
    "8 bits instead of 4: it has {classes} classes and the data {samples}; errors in the weights of a class "
    "that none of them shows move no figure, and still bias the model for or against it"
)


def with_wide_weights(quantizer: StaticQuantizer) -> StaticQuantizer:
    """Of the weights in 4 bits, those that err most for their size have 8, until the rest leave `NARROW_DB` by the sum
    of their errors."""
    if not quantizer.setup.config.is_narrow:
        return quantizer
    quantizer = _with_wide_heads(quantizer)
    chosen = too_narrow(_narrow(quantizer), quantizer.ranges.weight_errors, _ALLOWED)
    return _measured_again(quantizer, chosen) if chosen else quantizer


def _with_wide_heads(quantizer: StaticQuantizer) -> StaticQuantizer:
    """Class heads that the samples do not vouch for have 8 bits."""
    setup, findings = quantizer.setup, Findings()
    heads = unvouched_heads(setup.model, len(setup.context.data))
    layers = [layer for layer in _narrow(quantizer) if layer.name in heads]
    if not layers:
        return quantizer
    for layer in layers:
        findings.skip(
            layer,
            _FEW_SHOWN.format(classes=heads[layer.name or ""], samples=counted(len(setup.context.data), "sample")),
        )
    return _measured(replace(_widened(quantizer, layers), findings=quantizer.findings.plus(findings)), layers)


def widened_by_the_whole(quantizer: StaticQuantizer) -> StaticQuantizer:
    """The same by what the whole model errs on samples held out, beside what it errs with all weights in 8 bits:
    errors of 4 bits are not small, and do not add up. By as much as it is more than `NARROW_DB`, less of the sum is
    left.

    Float weights would be no measure: the means that activations shift in 8 bits, rounded weights may shift back.
    """
    ranges = quantizer.ranges
    if not quantizer.setup.config.is_narrow or not ranges.weight_errors:
        return quantizer
    narrow = _narrow(quantizer)
    if not narrow:
        return quantizer
    plain, chosen, budget = _of_held_out(quantizer, _plainly_wide(quantizer, narrow)), list[onnx_ir.Node](), math.inf
    for _ in range(_WIDENINGS):
        own = _of_held_out(quantizer, _widened(quantizer, chosen).quantize()[0])
        excess = max(_broken(one, other) for one, other in zip(own, plain, strict=True))
        if excess <= _ALLOWED or len(chosen) == len(narrow):
            break
        left = sum(ranges.weight_errors[layer.outputs[0].name or ""] for layer in narrow if layer not in chosen)
        budget = min(budget, left) * max(_ALLOWED / excess, _MOST_AT_ONCE)
        chosen = too_narrow(narrow, ranges.weight_errors, budget)
    return _measured_again(quantizer, chosen) if chosen else quantizer


def _narrow(quantizer: StaticQuantizer) -> list[onnx_ir.Node]:
    """The layers whose weights have 4 bits."""
    setup = quantizer.setup
    store = setup.weight_store(Editor(setup.model.clone()))
    return [layer for layer in setup.plan.layers if store.is_narrow(layer)]


def _plainly_wide(quantizer: StaticQuantizer, layers: Sequence[onnx_ir.Node]) -> Model:
    """With these weights in 8 bits, to the nearest level: that costs little beside what 4 bits do."""
    wide = _widened(quantizer, layers)
    return replace(wide, setup=replace(wide.setup, rounder=NearestRounder())).quantize()[0]


def _of_held_out(quantizer: StaticQuantizer, model: Model) -> tuple[Distances, Distances]:
    """Of a model's outputs on samples that no rounding was fitted to: before a softmax, where one gives them, and
    behind it. Errors that are little before it can change every answer."""
    setup = quantizer.setup
    context = replace(setup.context, data=held_out_samples(setup.context.data) or setup.context.data)
    before, behind = (output_distances(setup.model, model, context, behind_softmax=way) for way in (False, True))
    return before, behind


def _broken(own: Distances, other: Distances) -> float:
    """By how much errors exceed others, as a share of the signal's power, sample by sample: on samples that err much in
    either way the smaller error is a matter of chance, and does not pay for those that were right before."""
    if not np.isfinite(own.errors).all():
        return math.inf
    more = np.maximum(own.errors - other.errors, 0.0)
    return share(float(more.sum()), float(own.signals.sum()))


def _widened(quantizer: StaticQuantizer, layers: Sequence[onnx_ir.Node]) -> StaticQuantizer:
    """The same with 8 bits for the weights of these layers."""
    wide = quantizer.setup.wide | {required(layer, 1).name or "" for layer in layers}
    return replace(quantizer, setup=replace(quantizer.setup, wide=wide))


def _measured_again(narrow: StaticQuantizer, layers: Sequence[onnx_ir.Node]) -> StaticQuantizer:
    """With 8 bits for the weights of these layers, the errors that they have then, and what the report says of them
    in 4."""
    findings = Findings()
    for layer in layers:
        error = decibels(narrow.ranges.weight_errors[layer.outputs[0].name or ""])
        findings.skip(layer, f"8 bits instead of 4, which here alone would leave the outputs {error:.1f} dB")
    return _measured(replace(_widened(narrow, layers), findings=narrow.findings.plus(findings)), layers)


def _measured(quantizer: StaticQuantizer, layers: Sequence[onnx_ir.Node]) -> StaticQuantizer:
    """With the errors that the weights of these layers have now, where errors are known."""
    ranges, names = quantizer.ranges, [layer.outputs[0].name or "" for layer in layers]
    if not ranges.weight_errors:
        return quantizer
    errors = probe_of(quantizer.setup).errors([Trial(name, is_weight=True) for name in names])
    if errors is None:
        return quantizer
    known = {**ranges.weight_errors, **dict(zip(names, errors, strict=True))}
    return replace(quantizer, ranges=replace(ranges, weight_errors=known))


def too_narrow(layers: Sequence[onnx_ir.Node], errors: Mapping[str, float], budget: float) -> list[onnx_ir.Node]:
    """The layers whose weights get more bits, in their order, until the others' errors sum up to the `budget`.
    `errors`: of weights, by the names of outputs.

    First those that alone would be a catastrophe, then by the error that a byte takes away.
    """
    sizes = {layer.outputs[0].name or "": WeightStore.array(required(layer, 1)).size for layer in layers}
    known = {name: error for name, error in errors.items() if name in sizes}
    left = sum(error for error in known.values() if math.isfinite(error))
    chosen = []
    for name in sorted(known, key=lambda name: known[name] / max(1, sizes[name]), reverse=True):
        catastrophe = decibels(known[name]) < FLOOR_DB
        if catastrophe or left > budget:
            chosen.append(name)
            left -= known[name] if math.isfinite(known[name]) else 0.0
    return [layer for layer in layers if layer.outputs[0].name in chosen]


def without_weights(quantizer: StaticQuantizer) -> Model:
    """The float model with its activations quantized, and its weights as they are."""
    setup = quantizer.setup
    model = setup.model.clone()
    editor = Editor(model)
    plan = quantizer.plan.on(model.graph)
    QdqWriter(editor, setup.weight_store(editor)).write_activations(plan, quantizer.ranges.on(plan))
    guard_float_nodes(model.graph, editor)
    return model


def probe_of(setup: QuantizationSetup) -> SensitivityProbe:
    """Measures on samples that no rounding was fitted to, where there are enough: on others GPTQ errs by far less."""
    held_out = held_out_samples(setup.context.data) if setup.context.data.can_be_fitted else None
    return SensitivityProbe(setup, held_out.spread(MAX_SAMPLES) if held_out is not None else None)
