"""From Verilog to figures: yosys synthesizes, nextpnr places and routes on ECP5 parts.

Ports stay inside the part, between registers (`pins`): a network has more of them than a package has pins, and its
neighbours are in the same part.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from modelpress_compression.backends.fpga.gates import Netlist
from modelpress_compression.backends.fpga.parts import Part
from modelpress_compression.backends.fpga.pins import between_pins
from modelpress_compression.backends.fpga.tools import NEXTPNR_ECP5, WORK, YOSYS, run_tool

# Cells by what they take of the part.
_LUTS: Mapping[str, float] = {
    "LUT4": 1, "CCU2C": 2, "TRELLIS_DPR16X4": 4,
    "LUT1": 1, "LUT2": 1, "LUT3": 1, "LUT4_": 1, "LUT5": 1, "LUT6": 1, "INV": 0,
    "RAM32M": 4, "RAM64M": 4, "SRL16E": 1, "SRLC32E": 1,
}  # fmt: skip
_FLIP_FLOPS = ("TRELLIS_FF", "FDRE", "FDSE", "FDCE", "FDPE")
_DSPS = ("MULT18X18D", "DSP48E1", "DSP48E2")
_BRAMS: Mapping[str, int] = {"DP16KD": 1, "PDPW16KD": 1, "RAMB18E1": 1, "RAMB36E1": 2, "RAMB18E2": 1, "RAMB36E2": 2}
_OF_PINS = ("TRELLIS_IO", "DCCA")  # what nextpnr puts at pins and behind the clock's
# Expands cells into gates by their simulation models, one clock, no enables or resets left.
_TO_GATES = "proc; flatten; memory_map; opt -fast; techmap; simplemap; dffunmap; opt_clean -purge"
_MODELS = {"ecp5": "+/ecp5/cells_sim.v", "xc7": "+/xilinx/cells_sim.v"}


@dataclass(frozen=True)
class Resources:
    """What a design takes of a part. `cells`: by the names of the tool."""

    luts: int
    flip_flops: int
    dsps: int
    brams: int
    cells: Mapping[str, int] = field(default_factory=dict)

    def shares(self, part: Part) -> dict[str, float]:
        """Of what the part has."""
        return {
            "luts": self.luts / part.luts,
            "flip_flops": self.flip_flops / part.flip_flops,
            "dsps": self.dsps / part.dsps,
            "brams": self.brams / part.brams,
        }

    def fits(self, part: Part) -> bool:
        return max(self.shares(part).values()) <= 1.0


def write_sources(sources: Mapping[str, str], folder: Path) -> str:
    """Into `folder`/rtl; yosys' command that reads them."""
    (folder / "rtl").mkdir(exist_ok=True)
    for name, text in sources.items():
        (folder / "rtl" / name).write_text(text, "utf-8")
    return "read_verilog -sv " + " ".join(f"{WORK}/rtl/{name}" for name in sorted(sources) if name.endswith(".v"))


def synthesize(read: str, top: str, part: Part, folder: Path, time_left_s: float | None = None) -> Resources:
    """What `top` takes of the part, by yosys; the netlist lies in `folder`/netlist.json afterwards."""
    command = (
        f"synth_ecp5 -top {top}"
        if part.family == "ecp5"
        else f"synth_xilinx -family {part.family} -noiopad -noclkbuf -top {top}"
    )
    script = f"{read}; {command} -flatten; write_json {WORK}/netlist.json; tee -q -o {WORK}/stat.json stat -json"
    if part.family == "ecp5":
        script = script.replace(" -flatten", "")  # it always does
    run_tool(YOSYS, ["-q", "-p", script], folder, time_left_s)
    cells = Counter(json.loads((folder / "stat.json").read_text("utf-8"))["design"]["num_cells_by_type"])
    return Resources(
        luts=round(sum(weight * cells[name] for name, weight in _LUTS.items())),
        flip_flops=sum(cells[name] for name in _FLIP_FLOPS),
        dsps=sum(cells[name] for name in _DSPS),
        brams=sum(weight * cells[name] for name, weight in _BRAMS.items()),
        cells=dict(cells),
    )


@dataclass(frozen=True)
class Routed:
    """`fmax_mhz`: of the slowest path between registers, after routing, at the slow corner of speed grade 6. `used`,
    `available`: by nextpnr's names, without the registers at the pins."""

    fmax_mhz: float
    used: Mapping[str, int]
    available: Mapping[str, int]


def place_and_route(part: Part, top: str, clock_mhz: float, folder: Path, time_left_s: float | None = None) -> Routed:
    """Of `folder`/netlist.json. Raises ToolError where it does not fit, TimeLimitError."""
    added = between_pins(folder / "netlist.json", folder / "pins.json", top)
    arguments = [part.routed, "--package", part.package, "--speed", "6", "--seed", "1"]
    # Router1, the default, tears up single nets again and again; router2 negotiates over all of them at once.
    arguments += ["--router", "router2", "--freq", f"{clock_mhz:g}", "--timing-allow-fail", "--quiet"]
    arguments += ["--json", f"{WORK}/pins.json", "--report", f"{WORK}/routed.json"]
    run_tool(NEXTPNR_ECP5, arguments, folder, time_left_s)
    report = json.loads((folder / "routed.json").read_text("utf-8"))
    speeds = [clock["achieved"] for clock in report["fmax"].values()]
    rows: Mapping[str, Any] = report["utilization"]
    used = {name: row["used"] - added.get(name, 0) for name, row in rows.items() if name not in _OF_PINS}
    taken = {name: number for name, number in used.items() if number}
    return Routed(min(speeds), taken, {name: rows[name]["available"] for name in taken})


def gates_as_written(read: str, top: str, folder: Path, time_left_s: float | None = None) -> Netlist:
    """The design as gates, before anything is optimized."""
    script = f"{read}; hierarchy -top {top}; {_TO_GATES.replace('memory_map', 'memory_collect')}; "
    script += f"write_json {WORK}/gates.json"
    run_tool(YOSYS, ["-q", "-p", script], folder, time_left_s)
    return Netlist(folder / "gates.json", top)


def gates_synthesized(top: str, part: Part, folder: Path, time_left_s: float | None = None) -> Netlist:
    """What synthesis made of it, in `folder`/netlist.json, as gates."""
    # Cells that were read as boxes, and the variants that are named after their parameters, make room for the models.
    script = f"read_json {WORK}/netlist.json; delete =A:blackbox=1 =A:whitebox=1 =$paramod*; "
    script += f"read_verilog -sv -overwrite {_MODELS[part.family]}; "
    script += f"hierarchy -top {top}; setattr -mod -unset whitebox -unset lib_whitebox =*; "
    script += f"{_TO_GATES}; write_json {WORK}/synthesized.json"
    run_tool(YOSYS, ["-q", "-p", script], folder, time_left_s)
    return Netlist(folder / "synthesized.json", top)


def stream(bits: NDArray[np.bool_], lanes: int) -> NDArray[np.bool_]:
    """[samples, width] in a pipeline of `lanes` side by side, one after the other: [cycles, lanes, width]."""
    cycles = -(-len(bits) // lanes)
    room = np.zeros((cycles * lanes, bits.shape[1]), np.bool_)
    room[: len(bits)] = bits
    return room.reshape(lanes, cycles, -1).transpose(1, 0, 2)


def unstream(bits: NDArray[np.bool_], samples: int) -> NDArray[np.bool_]:
    """The inverse of `stream`."""
    return bits.transpose(1, 0, 2).reshape(-1, bits.shape[2])[:samples]
