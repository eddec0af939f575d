"""Which range each activation of a plan gets, by the error that it makes at the model's outputs.

The activations that make most of the error are looked at again. With `calibration: auto`, which starts from
percentiles, the ranges of all methods (observers.py) are tried for them; with any method, the range of each run is
tried for a product's input. The best is taken.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field, replace

import onnx_ir

from modelpress_compression.graph.read import required
from modelpress_compression.graph.watch import Listener
from modelpress_compression.passes.quantize.config import QuantizeConfig
from modelpress_compression.passes.quantize.plan import Plan, output_of
from modelpress_compression.passes.quantize.ranges.observers import METHODS, Histogram
from modelpress_compression.passes.quantize.ranges.output_error import Trial
from modelpress_compression.passes.quantize.ranges.sensitivity import SensitivityProbe
from modelpress_compression.passes.quantize.rounding.affine import ActivationParameters, activation_parameters

AUTO = "auto"
_START = "percentile"
# Other ranges are tried for the activations that make up this share of the error, and for at most so many.
_WORST_SHARE, _MOST_TRIED = 0.9, 24
# Below this share of the whole error, better rounding of weights is not worth its time.
_LEAST_WEIGHT_SHARE = 0.2
# Two ranges are the same if their scales differ by less than this share, and their edges by less than it of the range.
_SAME = 0.01
# Finding the range in each run costs a pass over the activation: it must remove at least this share of its error.
_LEAST_GAIN_OF_DYNAMIC = 0.3


@dataclass(frozen=True)
class Ranges:
    """`parameters` of each activation's own range, by its name; `dynamic`: inputs of products that find theirs in each
    run.

    `activation_errors`, `weight_errors`: error at the outputs, by the activation's name and by that of the layer's
    output; empty where they were not measured.
    """

    parameters: Mapping[str, ActivationParameters]
    dynamic: Set[str] = frozenset()
    activation_errors: Mapping[str, float] = field(default_factory=dict)
    weight_errors: Mapping[str, float] = field(default_factory=dict)

    def on(self, plan: Plan) -> dict[str, ActivationParameters]:
        """The parameters that the plan's activations have in it, by their names."""
        return {item.value.name or "": self.parameters[item.range_of.name or ""] for item in plan.activations.values()}

    def error_of(self, plan: Plan) -> float | None:
        """Error at the outputs that a plan will make, the sum of its parts; None: it was not measured."""
        if not self.weight_errors:
            return None
        roots = [item.value for item in plan.activations.values() if item.range_of is item.value]
        return sum(map(self._of_activation, roots)) + sum(map(self._of_weight, plan.layers))

    def error_at(self, layer: onnx_ir.Node) -> float:
        """What a layer's weight and input make together."""
        return self._of_activation(layer.inputs[0]) + self._of_weight(layer)

    def error_saved(self, layer: onnx_ir.Node, plan: Plan) -> float:
        """What goes when a layer goes back to float32: its weight's error, that of its output where it writes 8 bits,
        and its part of that of its input where the input came in float32."""
        saved = self._of_weight(layer)
        output = plan.activations.get(output_of(layer))
        if output is not None and output.all_consumers:
            saved += self._of_activation(output.value)
        source = plan.activations.get(required(layer, 0))
        if source is not None and not source.all_consumers:
            readers = sum(user in plan.members for user in source.value.consumers())
            saved += self._of_activation(source.value) / max(readers, 1)
        return saved

    def _of_activation(self, value: onnx_ir.Value | None) -> float:
        return 0.0 if value is None else self.activation_errors.get(value.name or "", 0.0)

    def _of_weight(self, layer: onnx_ir.Node) -> float:
        return self.weight_errors.get(layer.outputs[0].name or "", 0.0)


def start_ranges(plan: Plan, histograms: Mapping[str, Histogram], config: QuantizeConfig) -> Ranges:
    """Ranges by the configured method alone."""
    method = METHODS[_START if config.calibration == AUTO else config.calibration]
    names = [value.name or "" for value in plan.observed()]
    return Ranges({name: activation_parameters(method(histograms[name]), config.activations) for name in names})


def measure_errors(ranges: Ranges, probe: SensitivityProbe, done: Listener | None = None) -> Ranges | None:
    """The ranges with the errors that they and the weights make; None: that would take too long."""
    plan = probe.setup.plan
    activations = [item.value.name or "" for item in plan.activations.values() if item.has_own_range]
    weights = [layer.outputs[0].name or "" for layer in plan.layers]
    trials = [Trial(name, parameters=ranges.parameters[name]) for name in activations]
    errors = probe.errors([*trials, *(Trial(name, is_weight=True) for name in weights)], done)
    if errors is None:
        return None
    return replace(
        ranges,
        activation_errors=dict(zip(activations, errors, strict=False)),
        weight_errors=dict(zip(weights, errors[len(activations) :], strict=True)),
    )


def refine(
    ranges: Ranges, histograms: Mapping[str, Histogram], probe: SensitivityProbe, done: Listener | None = None
) -> Ranges:
    """The ranges with the best that there is for those activations that make most of the error."""
    worst = _worst(ranges.activation_errors)
    trials = [trial for name in worst for trial in _alternatives(name, ranges, histograms[name], probe)]
    found = probe.errors(trials, done) if trials else None
    if found is None:
        return ranges
    parameters, dynamic, errors = dict(ranges.parameters), set(ranges.dynamic), dict(ranges.activation_errors)
    # Ranges of a run last: they must beat the best fixed one.
    for trial, error in sorted(zip(trials, found, strict=True), key=lambda item: item[0].parameters is None):
        least = 1 - _LEAST_GAIN_OF_DYNAMIC if trial.parameters is None else 1.0
        if error >= least * errors[trial.name]:
            continue
        errors[trial.name] = error
        if trial.parameters is None:
            dynamic.add(trial.name)
        else:
            parameters[trial.name] = trial.parameters
    return replace(ranges, parameters=parameters, dynamic=dynamic, activation_errors=errors)


def worst_weights(ranges: Ranges) -> list[str]:
    """Names of the outputs of the layers whose weights make most of the weights' error; none where that is little
    beside the activations'."""
    weights, activations = sum(ranges.weight_errors.values()), sum(ranges.activation_errors.values())
    if not weights or weights < _LEAST_WEIGHT_SHARE * (weights + activations):
        return []
    return _worst(ranges.weight_errors, len(ranges.weight_errors))


def improved_weights(ranges: Ranges, names: Sequence[str], probe: SensitivityProbe) -> dict[str, float]:
    """The errors of a probe with other weights, where they are smaller than in `ranges`."""
    errors = probe.errors([Trial(name, is_weight=True) for name in names]) or ()
    return {name: error for name, error in zip(names, errors, strict=False) if error < ranges.weight_errors[name]}


def _worst(errors: Mapping[str, float], most: int = _MOST_TRIED) -> list[str]:
    names = sorted(errors, key=lambda name: -errors[name])[:most]
    left, chosen = _WORST_SHARE * sum(errors.values()), []
    for name in names:
        if left <= 0 or not errors[name]:
            break
        chosen.append(name)
        left -= errors[name]
    return chosen


def _alternatives(name: str, ranges: Ranges, histogram: Histogram, probe: SensitivityProbe) -> Iterator[Trial]:
    """What the activation may have instead of its range."""
    config, plan = probe.setup.config, probe.setup.plan
    known = [ranges.parameters[name]]
    for method in METHODS.values() if config.calibration == AUTO else ():
        parameters = activation_parameters(method(histogram), config.activations)
        if not any(_alike(parameters, other) for other in known):
            known.append(parameters)
            yield Trial(name, parameters=parameters)
    if _may_be_dynamic(name, plan):
        yield Trial(name)


def _may_be_dynamic(name: str, plan: Plan) -> bool:
    """Whether products alone read the activation in 8 bits, and nothing makes it in 8 bits."""
    activation = next(item for item in plan.activations.values() if item.value.name == name)
    readers = [node for node in plan.nodes if any(value is activation.value for value in node.inputs)]
    return not activation.all_consumers and all(node.op_type in ("MatMul", "Gemm") for node in readers)


def _alike(first: ActivationParameters, second: ActivationParameters) -> bool:
    scale = float(first.scale)
    edges = [abs(item.zero_point * float(item.scale)) for item in (first, second)]
    return abs(scale - float(second.scale)) < _SAME * scale and abs(edges[0] - edges[1]) < 255 * _SAME * scale
