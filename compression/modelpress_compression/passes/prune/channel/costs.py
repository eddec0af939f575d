"""What one unit of a group costs: parameters, multiply-accumulates, or time on this machine.

MACs and time belong to nodes. A unit's part of a node's cost is the part of the weight's axis that it owns; a layer's
cost so counts for the channels that it reads and for those that it makes.

Time is marginal: each node is timed in the model and in the same model with half of every group cut, and what the cut
saved is what the channels cost. Nodes are timed by onnxruntime's profiler, without its fusions, which would hide them.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import median
from types import MappingProxyType

import numpy as np
import onnxruntime as ort

from modelpress_compression.analysis.channels import Group, cut
from modelpress_compression.analysis.graph import label
from modelpress_compression.analysis.macs import count_macs
from modelpress_compression.analysis.shapes import sample_shapes
from modelpress_compression.model import Model
from modelpress_compression.passes.base import Context
from modelpress_compression.passes.prune.channel.weights import Weights
from modelpress_compression.runtime import EXECUTION_PROVIDER, explain

Costs = Mapping[str, float]  # of one unit by the group's id
_PROFILED_RUNS = 12
_WARM_UP_RUNS = 3
# No layer is free: what a cut does not make faster still costs a little of what the dearest costs.
_LEAST_SHARE = 1e-3


def equal(model: Model, groups: Sequence[Group], context: Context) -> Costs:
    """Every channel counts the same."""
    return {group.id: float(group.align) for group in groups}


def parameters(model: Model, groups: Sequence[Group], context: Context) -> Costs:
    """Numbers that go with a unit."""
    return {group.id: group.parameters_per_unit for group in groups}


def macs(model: Model, groups: Sequence[Group], context: Context) -> Costs:
    """Multiply-accumulates on one sample of the data; parameters where they are not known."""
    by_output = count_macs(model, sample_shapes(context.data)).by_output
    by_node = {label(node): float(_first(node.outputs, by_output) or 0) for node in model.nodes()}
    return _or_parameters(_of_units(groups, by_node, Weights(model)), groups)


def latency(model: Model, groups: Sequence[Group], context: Context) -> Costs:
    """Milliseconds that a unit costs on this machine, on one thread; parameters where nothing can be measured."""
    half = {group.id: np.arange(0, group.units, 2, dtype=np.int64) for group in groups if group.units > 1}
    whole = _node_times_ms(model, context, "whole")
    halved = _node_times_ms(cut(model, half), context, "half")
    saved = {name: max(0.0, 2 * (time_ms - halved.get(name, time_ms))) for name, time_ms in whole.items()}
    return _or_parameters(_of_units(groups, saved, Weights(model)), groups)


COSTS: Mapping[str, Callable[[Model, Sequence[Group], Context], Costs]] = MappingProxyType(
    {"none": equal, "parameters": parameters, "macs": macs, "latency": latency}
)


def _of_units(groups: Sequence[Group], by_node: Mapping[str, float], weights: Weights) -> dict[str, float]:
    """A unit's part of each node whose weight it owns indices of."""
    costs = {}
    for group in groups:
        total = 0.0
        for member in group.members:
            shape = weights.array(member.tensor).shape
            if len(shape) > 1:
                total += by_node.get(member.node, 0.0) * member.indices.shape[1] / shape[member.axis]
        costs[group.id] = total
    return costs


def _or_parameters(costs: dict[str, float], groups: Sequence[Group]) -> Costs:
    dearest = max(costs.values(), default=0.0)
    if dearest <= 0:
        return {group.id: group.parameters_per_unit for group in groups}
    return {name: max(cost, _LEAST_SHARE * dearest) for name, cost in costs.items()}


def _first(outputs: Sequence[object], by_output: Mapping[str, int | None]) -> int | None:
    return by_output.get(getattr(outputs[0], "name", None) or "") if outputs else None


def _node_times_ms(model: Model, context: Context, name: str) -> dict[str, float]:
    """Median milliseconds of one run of each node, by its label. Raises ModelNotRunnableError."""
    copy = model.clone()
    for node in copy.nodes():
        node.name = label(node)
    folder = context.work_directory / f"profile-{name}"
    folder.mkdir(parents=True, exist_ok=True)
    copy.save(folder / "model.onnx")
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.inter_op_num_threads = 1
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.enable_profiling = True
    options.profile_file_prefix = str(folder / "times")
    options.log_severity_level = 4
    feed = next(iter(context.data.feeds(1)))
    try:
        session = ort.InferenceSession(str(folder / "model.onnx"), options, providers=[EXECUTION_PROVIDER])
        names = {value.name for value in session.get_inputs()}
        for _ in range(_WARM_UP_RUNS + _PROFILED_RUNS):
            context.check_time()
            session.run(None, {key: array for key, array in feed.items() if key in names})
        profile = Path(session.end_profiling())
    except Exception as error:  # onnxruntime raises a dozen unrelated classes, all mean the same here
        raise explain(error) from error
    return _median_times_ms(json.loads(profile.read_text("utf-8")))


def _median_times_ms(events: Sequence[Mapping[str, object]]) -> dict[str, float]:
    times_us: dict[str, list[float]] = {}
    for event in events:
        name, duration = str(event.get("name", "")), event.get("dur", 0)
        if event.get("cat") == "Node" and name.endswith("_kernel_time") and isinstance(duration, int | float):
            times_us.setdefault(name.removesuffix("_kernel_time"), []).append(float(duration))
    return {name: median(times[_WARM_UP_RUNS:] or times) / 1e3 for name, times in times_us.items()}
