"""Which range each tensor of a plan gets, by the error that it makes at the model's outputs.

The tensors that make most of the error are looked at again. With `calibration: auto`, which starts from percentiles,
they try what every method (observers.py) would give them; with any method, a product's input tries the range that it
has in each run. The best is taken.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import onnx_ir

from modelpress_compression.graph.watch import Listener
from modelpress_compression.passes.quantize.config import QuantizeConfig
from modelpress_compression.passes.quantize.plan import Plan, output_of
from modelpress_compression.passes.quantize.ranges.observers import METHODS, Histogram
from modelpress_compression.passes.quantize.ranges.output_error import ErrorProbe, Trial
from modelpress_compression.passes.quantize.rounding.affine import ActivationParameters, activation_parameters

AUTO = "auto"
_START = "percentile"
# Tensors that make up this share of the error, and at most so many, try other ranges.
_WORST_SHARE, _MOST_TRIED = 0.9, 24
# Below this share of the whole error, better rounding of weights is not worth its time.
_LEAST_WEIGHT_SHARE = 0.2
# Two ranges are the same when their scales and edges differ by less than this share of the scale's.
_SAME = 0.01
# A range in each run costs a pass over the tensor: it must take away so much of its error.
_LEAST_GAIN_OF_DYNAMIC = 0.3


@dataclass
class Ranges:
    """`parameters` of each tensor's own range, by its name; `dynamic`: inputs of products that find theirs in each run.

    `tensor_errors`, `weight_errors`: error at the outputs, by the tensor's name and by that of the heavy node's output;
    empty where they were not measured.
    """

    parameters: dict[str, ActivationParameters]
    dynamic: set[str] = field(default_factory=set)
    tensor_errors: dict[str, float] = field(default_factory=dict)
    weight_errors: dict[str, float] = field(default_factory=dict)

    def on(self, plan: Plan) -> dict[str, ActivationParameters]:
        """The parameters that the plan's tensors have in it, by their names."""
        return {
            tensor.value.name or "": self.parameters[tensor.range_of.name or ""] for tensor in plan.tensors.values()
        }

    def error_of(self, plan: Plan) -> float | None:
        """Error at the outputs that a plan will make, the sum of its parts; None: it was not measured."""
        if not self.weight_errors:
            return None
        roots = [tensor for tensor in plan.tensors.values() if tensor.range_of is tensor.value]
        tensors = sum(self.tensor_errors.get(tensor.value.name or "", 0.0) for tensor in roots)
        return tensors + sum(self.weight_errors.get(node.outputs[0].name or "", 0.0) for node in plan.heavy)

    def error_at(self, node: onnx_ir.Node) -> float:
        """What a heavy node's weight and input make together."""
        source = node.inputs[0]
        inputs = self.tensor_errors.get(source.name or "", 0.0) if source is not None else 0.0
        return inputs + self.weight_errors.get(node.outputs[0].name or "", 0.0)

    def error_saved(self, node: onnx_ir.Node, plan: Plan) -> float:
        """What goes when a heavy node goes back to float32: its weight's error, that of its output where it writes 8
        bits, and its part of that of its input where the input came in float32."""
        saved = self.weight_errors.get(node.outputs[0].name or "", 0.0)
        output = plan.tensors.get(id(output_of(node)))
        if output is not None and output.all_consumers:
            saved += self.tensor_errors.get(output.value.name or "", 0.0)
        source = plan.tensors.get(id(node.inputs[0]))
        if source is not None and not source.all_consumers:
            readers = sum(user in plan.members for user in source.value.consumers())
            saved += self.tensor_errors.get(source.value.name or "", 0.0) / max(readers, 1)
        return saved


def start_ranges(plan: Plan, histograms: Mapping[str, Histogram], config: QuantizeConfig) -> Ranges:
    """Ranges by the configured method alone."""
    method = METHODS[_START if config.calibration == AUTO else config.calibration]
    return Ranges(
        {
            value.name or "": activation_parameters(method(histograms[value.name or ""]), config.activations)
            for value in plan.observed()
        }
    )


def measure_errors(ranges: Ranges, plan: Plan, probe: ErrorProbe, done: Listener | None = None) -> bool:
    """Fills in the errors; returns whether there was time to."""
    tensors = [tensor.value.name or "" for tensor in plan.tensors.values() if tensor.has_own_range]
    weights = [node.outputs[0].name or "" for node in plan.heavy]
    trials = [Trial(name, parameters=ranges.parameters[name]) for name in tensors]
    errors = probe.errors([*trials, *(Trial(name, is_weight=True) for name in weights)], done)
    if errors is None:
        return False
    ranges.tensor_errors = dict(zip(tensors, errors, strict=False))
    ranges.weight_errors = dict(zip(weights, errors[len(tensors) :], strict=True))
    return True


def refine(
    ranges: Ranges,
    plan: Plan,
    histograms: Mapping[str, Histogram],
    config: QuantizeConfig,
    probe: ErrorProbe,
    done: Listener | None = None,
) -> None:
    """Gives the tensors that make most of the error the best range there is."""
    trials = [
        trial
        for name in _worst(ranges.tensor_errors)
        for trial in _alternatives(name, ranges, plan, histograms[name], config)
    ]
    errors = probe.errors(trials, done) if trials else None
    if errors is None:
        return
    # Ranges of a run last: they must beat the best fixed one.
    for trial, error in sorted(zip(trials, errors, strict=True), key=lambda item: item[0].parameters is None):
        least = 1 - _LEAST_GAIN_OF_DYNAMIC if trial.parameters is None else 1.0
        if error >= least * ranges.tensor_errors[trial.name]:
            continue
        ranges.tensor_errors[trial.name] = error
        if trial.parameters is None:
            ranges.dynamic.add(trial.name)
        else:
            ranges.parameters[trial.name] = trial.parameters


def worst_weights(ranges: Ranges) -> list[str]:
    """Names of the outputs of the heavy nodes whose weights make most of the weights' error; none where that is little
    beside the tensors'."""
    weights, tensors = sum(ranges.weight_errors.values()), sum(ranges.tensor_errors.values())
    if not weights or weights < _LEAST_WEIGHT_SHARE * (weights + tensors):
        return []
    return _worst(ranges.weight_errors, len(ranges.weight_errors))


def improve_weights(ranges: Ranges, names: Sequence[str], probe: ErrorProbe) -> set[str]:
    """Takes the errors of a probe with other weights where they are smaller; returns where they are."""
    errors = probe.errors([Trial(name, is_weight=True) for name in names])
    better = {
        name: error for name, error in zip(names, errors or (), strict=False) if error < ranges.weight_errors[name]
    }
    ranges.weight_errors.update(better)
    return set(better)


def _worst(errors: Mapping[str, float], most: int = _MOST_TRIED) -> list[str]:
    names = sorted(errors, key=lambda name: -errors[name])[:most]
    left, chosen = _WORST_SHARE * sum(errors.values()), []
    for name in names:
        if left <= 0 or not errors[name]:
            break
        chosen.append(name)
        left -= errors[name]
    return chosen


def _alternatives(
    name: str, ranges: Ranges, plan: Plan, histogram: Histogram, config: QuantizeConfig
) -> Sequence[Trial]:
    tried = [ranges.parameters[name]]
    for method in METHODS.values() if config.calibration == AUTO else ():
        parameters = activation_parameters(method(histogram), config.activations)
        if not any(_alike(parameters, other) for other in tried):
            tried.append(parameters)
    trials = [Trial(name, parameters=parameters) for parameters in tried[1:]]
    if _may_be_dynamic(name, plan):
        trials.append(Trial(name))
    return trials


def _may_be_dynamic(name: str, plan: Plan) -> bool:
    """Whether products alone read the tensor in 8 bits, and nothing makes it in 8 bits."""
    tensor = next(tensor for tensor in plan.tensors.values() if tensor.value.name == name)
    readers = [node for node in plan.nodes if any(value is tensor.value for value in node.inputs)]
    return not tensor.all_consumers and all(node.op_type in ("MatMul", "Gemm") for node in readers)


def _alike(first: ActivationParameters, second: ActivationParameters) -> bool:
    scale = float(first.scale)
    edges = [abs(item.zero_point * float(item.scale)) for item in (first, second)]
    return abs(scale - float(second.scale)) < _SAME * scale and abs(edges[0] - edges[1]) < 255 * _SAME * scale
