"""The parts that designs are held against, with what they have; figures of the vendors' data sheets."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType


@dataclass(frozen=True)
class Part:
    """`luts`: lookup tables of `lut_inputs`; `brams`: of 18 kbit. `routed`: the option of nextpnr-ecp5 that names the
    device; empty: the tools here synthesize for it, and the vendor's place and route."""

    name: str
    title: str
    family: str
    lut_inputs: int
    luts: int
    flip_flops: int
    dsps: int
    brams: int
    routed: str = ""
    package: str = ""
    order_code: str = ""  # as the vendor's tool knows it


_ROWS = (
    Part("lfe5u-25f", "Lattice ECP5 LFE5U-25F", "ecp5", 4, 24_288, 24_288, 28, 56, "--25k", "CABGA381"),
    Part("lfe5u-45f", "Lattice ECP5 LFE5U-45F", "ecp5", 4, 43_848, 43_848, 72, 108, "--45k", "CABGA554"),
    Part("lfe5u-85f", "Lattice ECP5 LFE5U-85F", "ecp5", 4, 83_640, 83_640, 156, 208, "--85k", "CABGA756"),
    Part("xc7a35t", "AMD Artix-7 XC7A35T", "xc7", 6, 20_800, 41_600, 90, 100, order_code="xc7a35tcpg236-1"),
    Part("xc7a100t", "AMD Artix-7 XC7A100T", "xc7", 6, 63_400, 126_800, 240, 270, order_code="xc7a100tcsg324-1"),
    Part("xc7z020", "AMD Zynq-7000 XC7Z020", "xc7", 6, 53_200, 106_400, 220, 280, order_code="xc7z020clg400-1"),
    Part("xcku115", "AMD Kintex UltraScale KU115", "xcu", 6, 663_360, 1_326_720, 5_520, 4_320,
         order_code="xcku115-flvb2104-2-i"),
    Part("xcvu13p", "AMD Virtex UltraScale+ VU13P", "xcup", 6, 1_728_000, 3_456_000, 12_288, 5_376,
         order_code="xcvu13p-flga2577-2-e"),
)  # fmt: skip
PARTS: Mapping[str, Part] = MappingProxyType({row.name: row for row in _ROWS})
