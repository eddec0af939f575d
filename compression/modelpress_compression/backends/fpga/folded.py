"""A network as one unit for each layer, which takes its products in turns: what does not fit all at once.

A unit has P multipliers, for P outputs at a time. Its input lies in a memory with room for two samples, so that the
unit before writes the next while it reads; its weights lie in block RAM, P in a word. For each window of the pooling
behind it, each group of P outputs, and each place of the window it goes through all K products of an output:

    sum[p] = bias[p] + weight[p, k] * input[base + offset[k]]        for k = 0 ... K-1, one in each cycle

rounds, saturates, keeps the largest of the window, and writes the P results one after the other while the next are
under way. Padding is a border of zeros in the memory, which nobody writes to.

Cycles of a unit are positions * groups * K; those of the slowest are between two samples, those of all together are
from a sample to its answer. Multipliers go where the slowest unit is, as long as the part has DSPs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from math import ceil, prod

import numpy as np
from numpy.typing import NDArray

from modelpress_compression.backends.fpga.emulator import Design, sum_bits
from modelpress_compression.backends.fpga.folded_unit import Memory, Unit
from modelpress_compression.backends.fpga.folded_verilog import TOP, top_module, unit_module
from modelpress_compression.backends.fpga.formats import Port, Reals
from modelpress_compression.backends.fpga.gates import Netlist, Simulation
from modelpress_compression.backends.fpga.network import Layer, Linear, Network, Pool, Reshape, Shape
from modelpress_compression.backends.fpga.parts import Part
from modelpress_compression.errors import UnsupportedOperatorError

_ROOM = 0.9  # of a part's DSPs
_PATIENCE = 4  # times the cycles of all units: no design that works takes longer for two samples


@dataclass(frozen=True)
class FoldedDesign:
    """`sources`: Verilog by file name. A sample goes in through `given` and comes out through `made`, number by number;
    they have `inputs` and `outputs` of them."""

    sources: Mapping[str, str]
    units: tuple[Unit, ...]
    given: Port
    made: Port
    inputs: int
    outputs: int


@dataclass(frozen=True)
class Seen:
    """What a simulated design answered, [samples, outputs], and its cycles: from the first number of the first sample
    to the last of its answer, and from the end of that to the end of the next."""

    answers: Reals
    latency: int
    interval: int


def stream_through(netlist: Netlist, design: FoldedDesign, samples: Reals, check: Callable[[], None]) -> Seen:
    """Gives [samples, inputs] to the netlist, two to each lane, one after the other as fast as it takes them.

    `check` is called now and then, and may raise. Raises ValueError where no answer comes.
    """
    lanes = -(-len(samples) // 2)
    pairs = np.zeros((lanes * 2, design.inputs))
    pairs[: len(samples)] = samples
    numbers = design.given.bits(pairs.reshape(lanes, -1, 1)).transpose(1, 0, 2)
    simulation = Simulation(netlist, lanes)
    answers = np.zeros((lanes, 2, design.outputs))
    ends: list[int] = []
    given = made = 0
    for cycle in range(_PATIENCE * sum(unit.cycles for unit in design.units) + 10 * len(numbers)):
        if cycle % 1024 == 0:
            check()
        more = given < len(numbers)
        simulation.give("in_valid", np.full((lanes, 1), more))
        simulation.give("in_data", numbers[min(given, len(numbers) - 1)])
        simulation.settle()
        if simulation.see("out_valid")[0, 0]:
            index = int(simulation.see("out_index")[0] @ (1 << np.arange(len(netlist.ports["out_index"]))))
            answers[:, made // design.outputs, index] = design.made.values(simulation.see("out_data"))[:, 0]
            made += 1
            if made % design.outputs == 0:
                ends.append(cycle)
                if len(ends) == 2:
                    answered = answers.reshape(lanes * 2, -1)[: len(samples)]
                    return Seen(answered, ends[0] + 1, ends[1] - ends[0])
        given += more and bool(simulation.see("in_ready")[0, 0])
        simulation.rise()
    raise ValueError("the simulated design gives no answer")


def build_folded(network: Network, design: Design, part: Part) -> FoldedDesign:
    """Raises UnsupportedOperatorError where a layer cannot be folded, or weights do not fit the part's memories."""
    units = _shared_out(_units(network, design), part)
    brams = sum(unit.brams for unit in units)
    if brams > part.brams:
        raise UnsupportedOperatorError(
            f"The network does not fit on {part.title}: its weights and values take about {brams} block RAMs, and "
            f"{part.brams} are there. Take a larger part (--set target.part=...) or a smaller network.",
            op_type="",
        )
    sources = {f"unit{place}.v": unit_module(place, unit) for place, unit in enumerate(units)}
    sources[f"{TOP}.v"] = top_module(units)
    given, made = units[0].source, units[-1].target
    return FoldedDesign(
        sources,
        tuple(units),
        Port("in_data", 1, given.form),
        Port("out_data", 1, made.form),
        prod(given.shape),
        prod(made.shape),
    )


def _shared_out(units: list[Unit], part: Part) -> list[Unit]:
    """Multipliers go to the slowest unit, to the next number that saves it a group."""
    while True:
        slowest = max(range(len(units)), key=lambda place: units[place].cycles)
        unit = units[slowest]
        if unit.multipliers >= unit.most_multipliers:
            return units
        wider = min(ceil(unit.outputs / (unit.groups - 1)), unit.most_multipliers)
        tried = [*units]
        tried[slowest] = replace(unit, multipliers=wider)
        if sum(each.multipliers for each in tried) > _ROOM * part.dsps:
            return units
        units = tried


def _units(network: Network, design: Design) -> list[Unit]:
    """One for each layer with weights, each with the pooling behind it."""
    bits = sum_bits(network, design)
    found: list[Unit] = []
    stages = list(_stages(network))
    form = design.values[network.input]
    for place, (layer, operation, pool) in enumerate(stages):
        own = design.values[layer.output]
        following = stages[place + 1][1] if place + 1 < len(stages) else None
        shape = _map(layer.shape if pool is None else pool.shape)
        if following is not None and not following.kernel:
            shape = (prod(shape), 1, 1) if not operation.kernel else shape
        target = Memory(shape, _square(following.pads) if following is not None else (0, 0, 0, 0), own)
        source = found[-1].target if found else Memory(_map(network.input_shape), _square(operation.pads), form)
        found.append(_unit(layer, operation, pool, source, target, design, bits[layer.name]))
    return found


def _stages(network: Network) -> Iterable[tuple[Layer, Linear, Layer | None]]:
    """(layer, its operation, the pooling behind it). Raises UnsupportedOperatorError for what is no chain of them."""
    value, layer, operation, pool = network.input, None, None, None
    for each in network.layers:
        if each.inputs != (value,):
            raise _refusal(f"{each.name} takes not only what the layer before it gives")
        value = each.output
        made = each.operation
        if isinstance(made, Linear):
            if made.group != 1 or len(made.kernel) not in {0, 2}:
                raise _refusal(f"{each.name} is a convolution in groups, or of other than two axes")
            if layer is not None and operation is not None:
                yield layer, operation, pool
            layer, operation, pool = each, made, None
        elif isinstance(made, Pool) and not made.mean and not any(made.pads) and pool is None and layer is not None:
            pool = each
        elif not isinstance(made, Reshape):
            raise _refusal(f"{each.name} is no product, and no MaxPool behind one")
    if layer is not None and operation is not None:
        yield layer, operation, pool


def _unit(
    layer: Layer, operation: Linear, pool: Layer | None, source: Memory, target: Memory, design: Design, bits: int
) -> Unit:
    weight_form, own = design.weights[layer.name], design.values[layer.output]
    fraction = source.form.fraction
    steps = design.sum_fraction(layer, fraction)
    shift = max(steps - own.fraction, 0)
    half = 2.0 ** (shift - 1) if shift else 0.0
    biases = design.rounded_bias(layer, operation, fraction) * 2.0**steps + half
    # Where the output has more bits behind the point than the sum, the sum gets them: zeros.
    missing = 2 ** max(own.fraction - steps, 0)
    weights = weight_form.integers(design.rounded_weight(layer, operation)).reshape(len(operation.weight), -1)
    row = source.padded[2]
    if operation.kernel:
        strides = operation.strides
        channel, down, across = np.meshgrid(*(np.arange(size) for size in operation.weight.shape[1:]), indexing="ij")
        offsets = channel * prod(source.padded[1:]) + down * operation.dilations[0] * row
        offsets = (offsets + across * operation.dilations[1]).reshape(-1)
    else:
        strides, offsets = (1, 1), _inside(source)
    if pool is not None and isinstance(pool.operation, Pool):
        places, steps_of_pool = pool.operation.kernel, pool.operation.strides
    else:
        places, steps_of_pool = (1, 1), (1, 1)
    window = [down * strides[0] * row + across * strides[1] for down in range(places[0]) for across in range(places[1])]
    _, rows, columns = _map((pool or layer).shape)
    return Unit(
        name=layer.name,
        weights=weights * missing,
        biases=np.rint(biases).astype(np.int64) * missing,
        weight_bits=weight_form.width + missing.bit_length() - 1,
        sum_bits=bits + missing.bit_length(),
        shift=shift,
        relu=layer.relu,
        ceiling=int(own.integers(np.array(design.ceiling(layer)))),
        source=source,
        target=target,
        offsets=offsets,
        window=np.array(window, np.int64),
        rows=rows,
        columns=columns,
        row_step=steps_of_pool[0] * strides[0] * row,
        column_step=steps_of_pool[1] * strides[1],
    )


def _inside(memory: Memory) -> NDArray[np.int64]:
    """Addresses of all values in order, without the border."""
    channels, height, width = memory.padded
    places = np.arange(channels * height * width).reshape(channels, height, width)
    top, left, bottom, right = memory.pads
    return places[:, top : height - bottom, left : width - right].reshape(-1)


def _map(shape: Shape) -> Shape:
    """[channels, height, width]; a vector has one place."""
    if len(shape) == 3:
        return shape
    if len(shape) == 1:
        return (*shape, 1, 1)
    raise _refusal(f"a value has the shape {shape}")


def _square(pads: Shape) -> Shape:
    return pads or (0, 0, 0, 0)


def _refusal(reason: str) -> UnsupportedOperatorError:
    return UnsupportedOperatorError(
        f"The network does not fit with all products at once, and it cannot be folded here: {reason}. Chains of dense "
        f"layers and convolutions with MaxPool behind them can; for others take a larger part (--set target.part=...).",
        op_type="",
    )
