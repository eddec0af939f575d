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
_FLIP_FLOP, _MEMORY = "$_DFF_P_", "$mem_v2"
_Gate = tuple[str, list[int], list[int], int]  # kind, inputs, outputs, memory
_ZERO, _ONE = 0, 1  # places of the constants among the nets


@dataclass(frozen=True)
class _Step:
    """Gates of one kind that can be computed together; or, `memory`, one read of a memory."""

    kind: str
    inputs: tuple[NDArray[np.int64], ...]
    outputs: NDArray[np.int64]
    memory: int = -1


@dataclass(frozen=True)
class _Memory:
    """`words` [size, width]: what it holds at the start. `writes`: (address, data, enable) nets of each port."""

    words: NDArray[np.bool_]
    writes: tuple[tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]], ...]


class Netlist:
    """One module. Ports are arrays of bits, the lowest first. All flip-flops take the same clock, and start as the
    netlist says, or at 0.

    Memories are read at once, and written when the clock rises. Their addresses may not depend on the samples: all
    lanes read the same word.
    """

    def __init__(self, path: Path, top: str) -> None:
        """Reads what yosys' write_json wrote. Raises ValueError where the module has other cells than gates."""
        module = json.loads(path.read_text("utf-8"))["modules"][top]
        self._places: dict[int, int] = {}
        self.ports = {name: self._bits(port["bits"]) for name, port in module["ports"].items()}
        gates: list[_Gate] = []
        sources: list[int] = []
        targets: list[int] = []
        self.memories: list[_Memory] = []
        for name, cell in module["cells"].items():
            kind, wires = cell["type"], cell["connections"]
            if kind == _FLIP_FLOP:
                sources.append(self._place(wires["D"][0]))
                targets.append(self._place(wires["Q"][0]))
            elif kind in _INPUTS:
                pins = [self._place(wires[pin][0]) for pin in _INPUTS[kind]]
                gates.append((kind, pins, [self._place(wires["Y"][0])], -1))
            elif kind == _MEMORY:
                gates += self._memory(cell)
            elif kind != "$scopeinfo":
                raise ValueError(f"cell {name} is a {kind}, which is no simple gate")
        self.flip_flops, self.gates = len(targets), len(gates)
        self.sources, self.targets = np.array(sources, np.int64), np.array(targets, np.int64)
        self.steps = list(_levels(gates))
        self.ones = self._initial_ones(module["netnames"].values())
        self.nets = len(self._places) + 2

    def _initial_ones(self, names: Iterable[Mapping[str, Any]]) -> NDArray[np.int64]:
        """Nets that are 1 at the start."""
        found = []
        for name in names:
            start = name["attributes"].get("init", "")
            found += [self._place(net) for net, bit in zip(name["bits"], reversed(start), strict=False) if bit == "1"]
        return np.array(found, np.int64)

    def _memory(self, cell: Mapping[str, Any]) -> Iterable[_Gate]:
        """Its reads."""
        wires = {name: self._bits(bits) for name, bits in cell["connections"].items()}
        settings = {name: value for name, value in cell["parameters"].items() if isinstance(value, str)}
        size, width, address = (int(settings[name], 2) for name in ("SIZE", "WIDTH", "ABITS"))
        reads, writes = (int(settings[name], 2) for name in ("RD_PORTS", "WR_PORTS"))
        if int(settings["RD_CLK_ENABLE"].replace("x", "0"), 2):
            raise ValueError("a memory has reads of its own clock")
        content = settings["INIT"][::-1].ljust(size * width, "0")
        words = np.array([bit == "1" for bit in content[: size * width]]).reshape(size, width)
        ports = tuple(
            (
                wires["WR_ADDR"][port * address : (port + 1) * address],
                wires["WR_DATA"][port * width : (port + 1) * width],
                wires["WR_EN"][port * width : (port + 1) * width],
            )
            for port in range(writes)
        )
        self.memories.append(_Memory(words, ports))
        for port in range(reads):
            pins = wires["RD_ADDR"][port * address : (port + 1) * address].tolist()
            outputs = wires["RD_DATA"][port * width : (port + 1) * width].tolist()
            yield _MEMORY, pins, outputs, len(self.memories) - 1

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
        simulation = Simulation(self, next(iter(inputs.values())).shape[1])
        seen = []
        for cycle in range(cycles):
            for name, bits in inputs.items():
                simulation.give(name, bits[min(cycle, len(bits) - 1)])
            simulation.settle()
            seen.append(simulation.see(output))
            simulation.rise()
        return np.array(seen)


class Simulation:
    """A netlist at work, with a sample in each of `lanes`."""

    def __init__(self, netlist: Netlist, lanes: int) -> None:
        self._netlist, self._lanes, self._words = netlist, lanes, -(-lanes // 64)
        self._nets = np.zeros((netlist.nets, self._words), np.uint64)
        self._nets[_ONE] = _ALL
        self._nets[netlist.ones] = _ALL
        self._memories = [
            np.repeat(np.where(memory.words, _ALL, np.uint64(0))[:, :, None], self._words, axis=2)
            for memory in netlist.memories
        ]

    def give(self, port: str, bits: NDArray[np.bool_]) -> None:
        """[lanes, width] to an input."""
        self._nets[self._netlist.ports[port]] = _packed(bits, self._words)

    def see(self, port: str) -> NDArray[np.bool_]:
        """[lanes, width] of an output, as it has settled."""
        return _unpacked(self._nets[self._netlist.ports[port]], self._lanes)

    def settle(self) -> None:
        """Signals go through all gates."""
        nets = self._nets
        for step in self._netlist.steps:
            if step.memory >= 0:
                content = self._memories[step.memory]
                address = self._address(step.inputs[0])
                nets[step.outputs] = content[address] if address < len(content) else 0
            else:
                nets[step.outputs] = _GATES[step.kind](*(nets[places] for places in step.inputs))

    def rise(self) -> None:
        """The clock: flip-flops and memories take what has settled."""
        nets = self._nets
        for content, memory in zip(self._memories, self._netlist.memories, strict=True):
            for address_nets, data, enable in memory.writes:
                enabled = nets[enable]
                if not enabled.any():
                    continue
                address = self._address(address_nets)
                if address < len(content):
                    content[address] = (content[address] & ~enabled) | (nets[data] & enabled)
        nets[self._netlist.targets] = nets[self._netlist.sources]

    def _address(self, places: NDArray[np.int64]) -> int:
        """Raises ValueError where lanes differ."""
        first = self._nets[places, 0] & np.uint64(1)
        if (self._nets[places] != np.where(first, _ALL, np.uint64(0))[:, None]).any():
            raise ValueError("an address depends on the sample")
        return int(first @ (np.uint64(1) << np.arange(len(places), dtype=np.uint64)))


def _levels(gates: Sequence[_Gate]) -> Iterable[_Step]:
    """The gates in an order in which each comes after those that it depends on. Raises ValueError for loops."""
    producers = {output: place for place, (_, _, outputs, _) in enumerate(gates) for output in outputs}
    waiting = [0] * len(gates)
    users: defaultdict[int, list[int]] = defaultdict(list)
    for place, (_, inputs, _, _) in enumerate(gates):
        for producer in {producers[net] for net in inputs if net in producers}:
            waiting[place] += 1
            users[producer].append(place)
    ready = [place for place, number in enumerate(waiting) if not number]
    done = 0
    while ready:
        yield from _together([gates[place] for place in ready])
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


def _together(gates: Sequence[_Gate]) -> Iterable[_Step]:
    """Steps for gates that do not depend on each other."""
    kinds: defaultdict[str, list[_Gate]] = defaultdict(list)
    for gate in gates:
        kinds[gate[0]].append(gate)
    for kind, same in kinds.items():
        if kind == _MEMORY:
            for _, inputs, outputs, memory in same:
                yield _Step(kind, (np.array(inputs, np.int64),), np.array(outputs, np.int64), memory)
            continue
        pins = np.array([inputs for _, inputs, _, _ in same], np.int64).T
        yield _Step(kind, tuple(pins), np.array([outputs[0] for _, _, outputs, _ in same], np.int64))


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
    """[lanes, width] as [width, words]; lanes that there are not do as the first."""
    lanes, width = bits.shape
    room = np.repeat(bits[:1].T, words * 64, axis=1)
    room[:, :lanes] = bits.T
    return np.packbits(room, axis=-1, bitorder="little").view(np.uint64).reshape(width, words)


def _unpacked(words: Words, lanes: int) -> NDArray[np.bool_]:
    """[width, words] as [lanes, width]."""
    bits = np.unpackbits(np.ascontiguousarray(words).view(np.uint8), axis=-1, bitorder="little")
    return bits[:, :lanes].T.astype(np.bool_)
