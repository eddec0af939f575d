"""Simulates a netlist of simple gates, as yosys writes one, cycle by cycle, 64 samples at a time in each word.

It knows nothing of how the netlist came about: the design as it was written, or what is left of it after synthesis,
whose cells yosys expands into gates by the vendor's own simulation models.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

Words = NDArray[np.uint64]
_ALL = np.uint64(2**64 - 1)
_INPUTS: Mapping[str, str] = {
    "$_BUF_": "A", "$_NOT_": "A", "$_AND_": "AB", "$_NAND_": "AB", "$_OR_": "AB", "$_NOR_": "AB", "$_XOR_": "AB",
    "$_XNOR_": "AB", "$_ANDNOT_": "AB", "$_ORNOT_": "AB", "$_MUX_": "ABS",
}  # fmt: skip
_FLIP_FLOP = "$_DFF_P_"
_ZERO, _ONE = 0, 1  # places of the constants among the nets


@dataclass(frozen=True)
class _Step:
    """Gates of one kind that can be computed together."""

    kind: str
    inputs: tuple[NDArray[np.int64], ...]
    outputs: NDArray[np.int64]


class Netlist:
    """One module. Ports are arrays of bits, the lowest first. All flip-flops take the same clock, and start at 0."""

    def __init__(self, path: Path, top: str) -> None:
        """Reads what yosys' write_json wrote. Raises ValueError where the module has other cells than gates."""
        module = json.loads(path.read_text("utf-8"))["modules"][top]
        self._places: dict[int, int] = {}
        self._ports = {name: self._bits(port["bits"]) for name, port in module["ports"].items()}
        gates: list[tuple[str, list[int], int]] = []
        self._from: list[int] = []
        self._to: list[int] = []
        for name, cell in module["cells"].items():
            kind, wires = cell["type"], cell["connections"]
            if kind == _FLIP_FLOP:
                self._from.append(self._bits(wires["D"])[0])
                self._to.append(self._bits(wires["Q"])[0])
            elif kind in _INPUTS:
                gates.append((kind, [self._bits(wires[pin])[0] for pin in _INPUTS[kind]], self._bits(wires["Y"])[0]))
            elif kind not in {"$scopeinfo"}:
                raise ValueError(f"cell {name} is a {kind}, which is no simple gate")
        self.flip_flops, self.gates = len(self._to), len(gates)
        self._steps = list(_levels(gates))

    def _bits(self, bits: Iterable[Any]) -> NDArray[np.int64]:
        """Places of the nets; what is not driven is 0."""
        return np.array([self._place(bit) for bit in bits], np.int64)

    def _place(self, bit: int | str) -> int:
        if isinstance(bit, str):
            return _ONE if bit == "1" else _ZERO
        return self._places.setdefault(bit, len(self._places) + 2)

    def run(self, inputs: Mapping[str, NDArray[np.bool_]], output: str, cycles: int) -> NDArray[np.bool_]:
        """`inputs`: bits [cycles, lanes, width] of each port, the last repeated; lanes are independent of each other.

        The bits [cycles, lanes, width] of the port `output` before each rise of the clock.
        """
        lanes = next(iter(inputs.values())).shape[1]
        words = -(-lanes // 64)
        nets = np.zeros((len(self._places) + 2, words), np.uint64)
        nets[_ONE] = _ALL
        given = {name: _packed(bits, words) for name, bits in inputs.items()}
        sources, targets = np.array(self._from, np.int64), np.array(self._to, np.int64)
        seen = np.zeros((cycles, lanes, len(self._ports[output])), np.bool_)
        for cycle in range(cycles):
            for name, packed in given.items():
                nets[self._ports[name]] = packed[min(cycle, len(packed) - 1)]
            for step in self._steps:
                nets[step.outputs] = _GATES[step.kind](*(nets[places] for places in step.inputs))
            seen[cycle] = _unpacked(nets[self._ports[output]], lanes)
            nets[targets] = nets[sources]
        return seen


def _levels(gates: Sequence[tuple[str, list[int], int]]) -> Iterable[_Step]:
    """The gates in an order in which each comes after those that it depends on. Raises ValueError for loops."""
    producers = {output: place for place, (_, _, output) in enumerate(gates)}
    waiting = [0] * len(gates)
    users: defaultdict[int, list[int]] = defaultdict(list)
    for place, (_, inputs, _) in enumerate(gates):
        for net in set(inputs):
            if net in producers:
                waiting[place] += 1
                users[producers[net]].append(place)
    ready = [place for place, number in enumerate(waiting) if not number]
    done = 0
    while ready:
        kinds: defaultdict[str, list[int]] = defaultdict(list)
        for place in ready:
            kinds[gates[place][0]].append(place)
        for kind, places in kinds.items():
            pins = tuple(
                np.array([gates[place][1][pin] for place in places], np.int64) for pin in range(len(_INPUTS[kind]))
            )
            yield _Step(kind, pins, np.array([gates[place][2] for place in places], np.int64))
        done += len(ready)
        following = []
        for place in ready:
            for user in users[place]:
                waiting[user] -= 1
                if not waiting[user]:
                    following.append(user)
        ready = following
    if done != len(gates):
        raise ValueError("the gates make a loop")


_GATES: Mapping[str, Callable[..., Words]] = {
    "$_BUF_": lambda a: a,
    "$_NOT_": lambda a: ~a,
    "$_AND_": lambda a, b: a & b,
    "$_NAND_": lambda a, b: ~(a & b),
    "$_OR_": lambda a, b: a | b,
    "$_NOR_": lambda a, b: ~(a | b),
    "$_XOR_": lambda a, b: a ^ b,
    "$_XNOR_": lambda a, b: ~(a ^ b),
    "$_ANDNOT_": lambda a, b: a & ~b,
    "$_ORNOT_": lambda a, b: a | ~b,
    "$_MUX_": lambda a, b, s: (a & ~s) | (b & s),
}


def _packed(bits: NDArray[np.bool_], words: int) -> Words:
    """[cycles, lanes, width] as [cycles, width, words]."""
    cycles, lanes, width = bits.shape
    room = np.zeros((cycles, width, words * 64), np.uint8)
    room[:, :, :lanes] = bits.transpose(0, 2, 1)
    return np.packbits(room, axis=-1, bitorder="little").view(np.uint64)


def _unpacked(words: Words, lanes: int) -> NDArray[np.bool_]:
    """[width, words] as [lanes, width]."""
    bits = np.unpackbits(np.ascontiguousarray(words).view(np.uint8), axis=-1, bitorder="little")
    return bits[:, :lanes].T.astype(np.bool_)
