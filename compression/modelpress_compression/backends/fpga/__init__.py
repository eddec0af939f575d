"""FPGAs: a network becomes fixed point, then gates, then a placed and routed design with its figures.

network     the part of the graph that becomes hardware
formats, emulator, search    fixed point: what it is, what it computes, how many bits
choice, training    which of the designs that the search finds, with which weights
forms       the fixed-point network as ONNX, for onnxruntime and for other compilers (QONNX)
hls         the same in C++ for high-level synthesis (hls4ml)
parallel    gates: every product at once, a sample in every cycle (da4ml)
folded      products in turns, with weights in memory
synthesis, pins, gates, tools, parts    yosys, nextpnr, and a simulation of what they make
estimate    what a design in another form would take, by the formulas of FINN
project     all of it in one archive
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from modelpress_compression.backends.base import BuildRequest, Built
from modelpress_compression.backends.cpu import CPU, OnnxRuntimeRunner
from modelpress_compression.runtime import EXECUTION_PROVIDER
from modelpress_compression.target import Target


@dataclass(frozen=True)
class Fpga:
    """See `base.Backend` and `base.Builder`. Models run in onnxruntime: what is built has a form for it."""

    target: Target
    label: str = EXECUTION_PROVIDER
    remark: str = ""
    elsewhere: bool = False

    @classmethod
    def of(cls, target: Target) -> Fpga:
        """For the target's part. Raises ImportError where a package is missing."""
        from modelpress_compression.backends.fpga import build

        del build
        return cls(target)

    def open(self, path: Path, *, threads: int = 1, comparable: bool = False) -> OnnxRuntimeRunner:
        return CPU.open(path, threads=threads, comparable=comparable)

    def build(self, request: BuildRequest) -> Built:
        from modelpress_compression.backends.fpga.build import build

        return build(request, self.target)
