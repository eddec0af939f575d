"""A network as one pipeline that takes a sample in every cycle: all products at once, by distributed arithmetic.

da4ml (arXiv 2507.04535) turns products with constant weights into a small number of adders, without a multiplier, and
puts registers between them. What it traces here is `emulator.run` over again, on symbols instead of numbers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib.resources import files
from math import inf, prod
from typing import Any

import numpy as np
from da4ml.codegen.rtl.verilog import generate_io_wrapper, pipeline_logic_gen
from da4ml.trace import FixedVariableArray, FixedVariableArrayInput, HWConfig, comb_trace
from da4ml.trace.pipeline import to_pipeline
from da4ml.types import CombLogic
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray

from modelpress_compression.backends.fpga.emulator import (
    Design,
    fraction_of_values,
    mean_factor,
)
from modelpress_compression.backends.fpga.formats import Fixed, Port, Reals
from modelpress_compression.backends.fpga.network import Add, Layer, Linear, Network, Pool, Relu, Shape, Transpose

TOP = "network"
_BLOCKS = ("shift_adder.v", "negative.v", "mux.v", "multiplier.v", "binop.v")  # that its Verilog is made of
_UNIT_ADDERS = HWConfig(1, -1, -1)  # each adder costs a unit of time, whatever its width


@dataclass(frozen=True)
class ParallelDesign:
    """`sources`: Verilog by file name. A sample at `given` is answered at `made` after `latency` rises of the clock;
    the next may come after `interval`. `adders`: how many lookup tables da4ml expects."""

    sources: Mapping[str, str]
    given: Port
    made: Port
    latency: int
    adders: float
    interval: int = 1


def build_parallel(network: Network, design: Design, adders_per_stage: int) -> ParallelDesign:
    """`adders_per_stage`: that a number may pass between two registers. Sums of many bits take several."""
    logic = trace(network, design)
    pipeline = to_pipeline(logic, adders_per_stage, verbose=False)
    sources = {f"{name}.v": text for name, text in pipeline_logic_gen(pipeline, TOP).items()}
    # Gives all numbers of a port one width.
    sources[f"{TOP}_wrapper.v"] = generate_io_wrapper(pipeline, TOP, True)
    for name in _BLOCKS:
        sources[name] = (files("da4ml.codegen.rtl.verilog") / "source" / name).read_text("utf-8")
    return ParallelDesign(
        sources,
        _port("model_inp", logic.inp_kifs),
        _port("model_out", logic.out_kifs),
        len(pipeline.solutions) + 1,
        float(logic.cost),
    )


def _port(name: str, kifs: Any) -> Port:
    """da4ml's wrapper gives all numbers of a port the widest format."""
    signs, integers, fractions = np.asarray(kifs, np.int64)
    return Port(name, len(signs), Fixed(bool(signs.max()), int(integers.max()), int(fractions.max())))


def trace(network: Network, design: Design) -> CombLogic:
    """The network as adders, shifts and comparisons, without registers yet."""
    fractions = fraction_of_values(network, design)
    symbols = FixedVariableArrayInput(network.input_shape, hwconf=_UNIT_ADDERS)
    form = design.values[network.input]
    values = {network.input: symbols.quantize(int(form.signed), form.integer, form.fraction, "WRAP", "TRN")}
    for layer in network.layers:
        result = _compute(layer, [values[name] for name in layer.inputs], design, fractions[layer.inputs[0]])
        values[layer.output] = _rounded(result, layer, design) if layer.rounds else result
    return comb_trace(symbols, values[network.output], keep_dead_inputs=True)


def _rounded(result: Any, layer: Layer, design: Design) -> Any:
    form = design.values[layer.output]
    raised = result + form.step / 2
    if layer.relu:
        raised = raised.relu(f=np.full(raised.shape, form.fraction))
    if design.ceiling(layer) < form.high:
        raised = np.minimum(raised, design.ceiling(layer))
    return raised.quantize(int(form.signed), form.integer, form.fraction, "SAT", "TRN")


def _compute(layer: Layer, sources: list[Any], design: Design, fraction: int) -> Any:
    operation, (first, *others) = layer.operation, sources
    if isinstance(operation, Linear):
        weight = design.rounded_weight(layer, operation)
        bias = design.rounded_bias(layer, operation, fraction)
        if operation.kernel:
            return _convolution(first, operation, weight, bias).reshape(*layer.shape)
        return first @ weight.T + bias
    if isinstance(operation, Pool):
        windows = _windows(first.shape, operation.kernel, operation.strides, operation.pads, (1, 1))
        return _pooled(first, operation, windows).reshape(*layer.shape)
    if isinstance(operation, Add):
        return first + others[0]
    if isinstance(operation, Relu):
        high = operation.ceiling_at(fraction)
        return first.relu() if high == inf else np.minimum(first.relu(), high)
    return first.transpose(operation.axes) if isinstance(operation, Transpose) else first.reshape(*layer.shape)


def _windows(shape: Shape, kernel: Shape, strides: Shape, pads: Shape, dilations: Shape) -> NDArray[np.int64]:
    """Places [channels, positions, kernel places] in the flat sample; -1: padding."""
    axes = len(kernel)
    places = np.arange(prod(shape)).reshape(shape)
    wide = [(0, 0), *((pads[axis], pads[axes + axis]) for axis in range(axes))]
    padded = np.pad(places, wide, constant_values=-1)
    spans = tuple(dilations[axis] * (kernel[axis] - 1) + 1 for axis in range(axes))
    windows = sliding_window_view(padded, spans, axis=tuple(range(1, 1 + axes)))
    steps = (*(slice(None, None, each) for each in strides), *(slice(None, None, each) for each in dilations))
    return windows[(slice(None), *steps)].reshape(shape[0], -1, prod(kernel))


def _convolution(x: Any, operation: Linear, weight: Reals, bias: Reals) -> Any:
    windows = _windows(x.shape, operation.kernel, operation.strides, operation.pads, operation.dilations)
    flat, columns = x.reshape(-1), []
    for group, part in enumerate(np.split(weight.reshape(len(weight), -1), operation.group)):
        size = len(windows) // operation.group
        channels = windows[group * size : (group + 1) * size]
        results = []
        for position in range(channels.shape[1]):
            places = channels[:, position].reshape(-1)
            inside = places >= 0  # padding is nothing to add
            results.append((flat[places[inside]] @ part[:, inside].T)._vars)
        columns.append(np.stack(results, axis=1))
    return FixedVariableArray(np.concatenate(columns) + bias[:, None], hwconf=_UNIT_ADDERS)


def _pooled(x: Any, operation: Pool, windows: NDArray[np.int64]) -> Any:
    flat, results = x.reshape(-1), []
    for places in windows.reshape(-1, windows.shape[-1]):
        window = flat[places[places >= 0]]
        results.append(np.sum(window) * mean_factor(operation) if operation.mean else np.max(window))
    return FixedVariableArray(np.array(results, dtype=object), hwconf=_UNIT_ADDERS)
