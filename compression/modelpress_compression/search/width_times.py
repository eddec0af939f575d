"""What each layer takes on this machine in float32 and in 8 bits, whole and with more and more of its channels gone.

The model is cut by the same share in all groups at once, and each cut is timed as it runs, in float32 and with all in
8 bits that can be: so few models give every layer a curve, kinks included. A convolution of onnxruntime takes as long
for 8 channels as for 16, and in 8 bits a layer of few channels is no faster than in float32.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import onnx_ir

from modelpress_compression.channels import Group, cut
from modelpress_compression.graph.read import is_constant
from modelpress_compression.measure.layer_times import LayerTime, layer_times
from modelpress_compression.measure.stats import layer_name
from modelpress_compression.model import Model
from modelpress_compression.passes.base import Context
from modelpress_compression.passes.prune.channel.limits import Limits
from modelpress_compression.passes.prune.channel.weights import Weights
from modelpress_compression.passes.prune.config import PruneConfig
from modelpress_compression.passes.quantize.config import QuantizeConfig
from modelpress_compression.passes.quantize.quantize import prepare_static
from modelpress_compression.search.widths import MEASURED

_CALIBRATED = 4  # samples: times do not depend on ranges

Curve = tuple[tuple[float, float], ...]  # share of the weight that is left, rising, and milliseconds


@dataclass(frozen=True)
class LayerCurve:
    """Of the layer that makes `output` from the weight `tensor`; `in_8_bits`: empty where it has no such form."""

    output: str
    tensor: str
    in_float: Curve
    in_8_bits: Curve


def width_times(
    model: Model,
    groups: Sequence[Group],
    prune: PruneConfig,
    quantize: QuantizeConfig,
    context: Context,
    threads: int,
) -> list[LayerCurve]:
    """Of every layer whose weight some group narrows, or that has a form in 8 bits.

    Raises ModelNotRunnableError, TimeLimitError.
    """
    few = replace(context, data=context.data.spread(_CALIBRATED * context.data.feed_size))
    models = [_narrowed(model, groups, prune, share) for share in (0.0, *MEASURED)]
    pairs = [one for narrow in models for one in _both_forms(narrow, quantize, few)]
    with context.alone():
        times = layer_times(pairs, context.data, context.work_directory, threads)
    sizes = [Weights(narrow) for narrow in models]
    curves = []
    for node, tensor in _layers(model):
        shares = [own.array(tensor).size / sizes[0].array(tensor).size for own in sizes]
        in_float, in_8_bits = (_curve(layer_name(node), shares, times[form::2]) for form in (0, 1))
        if in_float:
            curves.append(LayerCurve(node.outputs[0].name or "", tensor, in_float, in_8_bits))
    return curves


def _narrowed(model: Model, groups: Sequence[Group], config: PruneConfig, share: float) -> Model:
    limits = Limits({}, config.round_to, config.min_channels)
    units = {group.id: max(limits.nearest(group, share), limits.fewest(group)) for group in groups}
    kept = {group.id: np.arange(units[group.id]) for group in groups if units[group.id] < group.units}
    return cut(model, kept) if kept else model


def _both_forms(model: Model, config: QuantizeConfig, context: Context) -> tuple[Model, Model]:
    """The model in float32, as quantization prepares it, and in 8 bits, where it can be."""
    quantizer = prepare_static(model, config, context, for_time_alone=True)
    if quantizer is None:
        return model, model
    return quantizer.setup.model, replace(quantizer, full=True).result().model


def _layers(model: Model) -> Iterator[tuple[onnx_ir.Node, str]]:
    """Nodes of the main graph that multiply by a constant weight, and its name."""
    for node in model.graph:
        weight = node.inputs[1] if node.op_type in ("Conv", "MatMul", "Gemm") and len(node.inputs) > 1 else None
        if weight is not None and weight.name and node.outputs[0].name and is_constant(weight):
            yield node, weight.name


def _curve(name: str, shares: Sequence[float], times: Sequence[Mapping[str, LayerTime]]) -> Curve:
    """A layer never takes longer when more of it is gone: what a clock says otherwise is noise."""
    if any(name not in own for own in times):
        return ()
    found: dict[float, float] = {}
    longest = 0.0
    for share, own in sorted(zip(shares, times, strict=True), key=lambda pair: pair[0]):
        longest = max(longest, own[name].ms)
        found[share] = longest
    return tuple(found.items())
