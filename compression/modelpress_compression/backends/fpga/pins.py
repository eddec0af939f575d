"""A netlist between few pins, so that it can be placed and routed as it will be inside a larger design.

A network has more ports than a package has pins. Here its inputs are registers that pass on a bit from one pin, and its
outputs end in registers that are mixed into one bit at another, so that nothing can be left out. Each path then lies
between two registers and counts for the clock, and the clock comes from a pin, by which nextpnr takes the part's clock
tree: without pins (`--out-of-context`) it winds the clock through the fabric to each flip-flop.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

CLOCK = "clk"
_XOR = "0110011001100110"  # of A and B, the lookup table of a LUT4
_FLIP_FLOP = {
    "CEMUX": "1 ", "CLKMUX": "CLK", "GSR": "DISABLED", "LSRMUX": "LSR", "REGSET": "RESET", "SRMODE": "LSR_OVER_CE",
}  # fmt: skip


def between_pins(source: Path, target: Path, top: str) -> dict[str, int]:
    """`source`: what `synth_ecp5` wrote of the module `top`. What the pins cost, by nextpnr's names."""
    netlist = json.loads(source.read_text("utf-8"))
    module = netlist["modules"][top]
    shell = _Shell(module)
    shell.close()
    netlist["modules"] = {top: module, **{name: other for name, other in netlist["modules"].items() if name != top}}
    target.write_text(json.dumps(netlist), "utf-8")
    return {"TRELLIS_FF": shell.registers, "TRELLIS_COMB": shell.mixers}


class _Shell:
    def __init__(self, module: dict[str, Any]) -> None:
        self._module, self._cells = module, module["cells"]
        used = [bit for port in module["ports"].values() for bit in port["bits"]]
        used += [bit for cell in self._cells.values() for bits in cell["connections"].values() for bit in bits]
        self._next = 1 + max(bit for bit in used if isinstance(bit, int))
        (self._clock,) = module["ports"][CLOCK]["bits"]
        self.registers = self.mixers = 0

    def close(self) -> None:
        """Puts the registers around the module, in place of its ports."""
        given = moved = self._net()
        registers: dict[int, int] = {}
        for bit in self._port_bits("input"):
            registers[bit] = moved = self._register(moved)
        for cell in list(self._cells.values()):
            for name, bits in cell["connections"].items():
                if cell["port_directions"].get(name) == "input":
                    cell["connections"][name] = [registers.get(bit, bit) for bit in bits]
        mixed: int | str = "0"
        for bit in self._port_bits("output"):
            mixed = self._register(self._mixed(registers.get(bit, bit), mixed))
        self._module["ports"] = {
            CLOCK: {"direction": "input", "bits": [self._clock]},
            "serial_in": {"direction": "input", "bits": [given]},
            "serial_out": {"direction": "output", "bits": [mixed]},
        }
        self._module["netnames"] = {}

    def _port_bits(self, direction: str) -> Iterable[int]:
        """Without the clock, and without constants."""
        for name, port in self._module["ports"].items():
            if port["direction"] == direction and name != CLOCK:
                yield from (bit for bit in port["bits"] if isinstance(bit, int))

    def _net(self) -> int:
        self._next += 1
        return self._next - 1

    def _register(self, source: int) -> int:
        made = self._net()
        self.registers += 1
        wires = {"CLK": self._clock, "DI": source, "LSR": "0", "Q": made}
        self._cell(f"pin_register_{made}", "TRELLIS_FF", _FLIP_FLOP, wires, "Q")
        return made

    def _mixed(self, first: int, second: int | str) -> int:
        made = self._net()
        self.mixers += 1
        wires = {"A": first, "B": second, "C": "0", "D": "0", "Z": made}
        self._cell(f"pin_mix_{made}", "LUT4", {"INIT": _XOR}, wires, "Z")
        return made

    def _cell(self, name: str, kind: str, settings: dict[str, str], wires: dict[str, int | str], output: str) -> None:
        self._cells[name] = {
            "hide_name": 0,
            "type": kind,
            "parameters": dict(settings),
            "attributes": {},
            "port_directions": {pin: "output" if pin == output else "input" for pin in wires},
            "connections": {pin: [wire] for pin, wire in wires.items()},
        }
