"""What a folded design would take: products in turns, weights in memory. An estimate, by the formulas of FINN.

Each layer is a matrix-vector unit of P outputs and Q inputs at a time; its cycles, lookup tables and block RAMs follow
from its sizes and bits. Convolutions keep as many rows of their input as their kernel is high. Reference: FINN-R
(arXiv 1809.04570), section 4, and `finn.custom_op.fpgadataflow` of FINN, whose constants these are. Pooling, sums and
the FIFOs between the units are not counted.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from math import ceil, log2, prod
from typing import Any

from modelpress_compression.backends.fpga.emulator import Design
from modelpress_compression.backends.fpga.network import Layer, Linear, Network
from modelpress_compression.backends.fpga.parts import Part

_BASE_LUTS, _LUT_FACTOR = 300, 1.1
_ROOM = 0.7  # of a part's lookup tables: fuller ones are hard to route


@dataclass(frozen=True)
class Unit:
    """A layer with `pe` outputs and `simd` inputs at a time."""

    layer: str
    pe: int
    simd: int
    cycles: int
    luts: int
    brams: int


@dataclass(frozen=True)
class Estimate:
    """`cycles`: of the slowest layer, between two samples."""

    part: Part
    units: tuple[Unit, ...]

    @property
    def luts(self) -> int:
        return sum(unit.luts for unit in self.units)

    @property
    def brams(self) -> int:
        return sum(unit.brams for unit in self.units)

    @property
    def cycles(self) -> int:
        return max(unit.cycles for unit in self.units)

    @property
    def latency_cycles(self) -> int:
        """Of one sample through all units in turn; they overlap, so that it is less."""
        return sum(unit.cycles for unit in self.units)

    def rows(self) -> list[dict[str, Any]]:
        """One for each unit, JSON types only."""
        return [asdict(unit) for unit in self.units]

    @property
    def fits(self) -> bool:
        return self.luts <= self.part.luts and self.brams <= self.part.brams

    def words(self) -> str:
        """One sentence."""
        how = f"about {self.luts:,} lookup tables and {self.brams:,} block RAMs, {self.cycles:,} cycles a sample"
        if self.fits:
            return f"Folded, by FINN's cost formulas and not built here, it would fit: {how}."
        return f"Even folded it would not fit, by FINN's cost formulas, which are estimates: {how}."


def estimate(network: Network, design: Design, part: Part) -> Estimate:
    """The fastest folding that fits: the slowest layer is unfolded further as long as there is room."""
    layers = network.linear()
    widths = [_widths(network, design, layer) for layer, _ in layers]
    folds = [(1, 1)] * len(layers)

    def units() -> tuple[Unit, ...]:
        parts = zip(layers, widths, folds, strict=True)
        return tuple(_unit(network, layer, operation, *bits, *fold) for (layer, operation), bits, fold in parts)

    best = Estimate(part, units())
    while True:
        slowest = max(range(len(layers)), key=lambda place: best.units[place].cycles)
        wider = _wider(layers[slowest][1], folds[slowest])
        if wider is None:
            return best
        folds[slowest] = wider
        tried = Estimate(part, units())
        if tried.luts > _ROOM * part.luts or tried.brams > part.brams:
            return best
        best = tried


def _widths(network: Network, design: Design, layer: Layer) -> tuple[int, int]:
    """Bits of weights and inputs."""
    name = layer.inputs[0]
    while name not in design.values:
        name = next(each.inputs[0] for each in network.layers if each.output == name)
    return design.weights[layer.name].width, design.values[name].width


def _wider(operation: Linear, fold: tuple[int, int]) -> tuple[int, int] | None:
    """The next larger divisor, of the inputs before the outputs; None: everything is unfolded."""
    outputs, inputs = len(operation.weight), operation.weight[0].size
    pe, simd = fold
    if simd < inputs:
        return pe, next(size for size in range(simd + 1, inputs + 1) if inputs % size == 0)
    if pe < outputs:
        return next(size for size in range(pe + 1, outputs + 1) if outputs % size == 0), simd
    return None


def _unit(
    network: Network, layer: Layer, operation: Linear, weight_bits: int, input_bits: int, pe: int, simd: int
) -> Unit:
    outputs, inputs = len(operation.weight), operation.weight[0].size
    cycles = (outputs // pe) * (inputs // simd) * network.positions(layer)
    both = weight_bits + input_bits
    products = simd * (2 * ceil(both / 6) - 1) * both
    tree = both * (2 * simd - 1)
    alpha = log2(inputs) + both - 1
    accumulator = ceil(alpha + log2(1 + 2**-alpha) + 1)
    luts = int(_BASE_LUTS + _LUT_FACTOR * pe * (products + tree + accumulator))
    brams = _brams(outputs * inputs // (pe * simd), simd * weight_bits * pe)
    if operation.kernel and operation.kernel[0] > 1:
        channels, *sizes = network.shape_of(layer.inputs[0])
        lines, wide = (operation.kernel[0] - 1) * prod(sizes[1:]) + operation.kernel[-1], min(simd, channels)
        brams += _brams(ceil(lines * channels / wide), wide * input_bits)
    return Unit(layer.name, pe, simd, cycles, luts, brams)


def _brams(words: int, width: int) -> int:
    """Block RAMs of 18 kbit for a memory of so many words (RAMB18 in simple dual port)."""
    if width <= 2:
        return ceil(words / (16384 // width))
    if width <= 4:
        return ceil(words / 4096) * ceil(width / 4)
    if width <= 9:
        return ceil(words / 2048) * ceil(width / 9)
    if width <= 18 or words > 512:
        return ceil(words / 1024) * ceil(width / 18)
    return ceil(words / 512) * ceil(width / 36)
