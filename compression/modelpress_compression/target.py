"""What the result of a compression will run on: the table of devices, and what a recipe may say of them.

All that the engine knows of a device besides its backend is its row here. This module imports no runtime: the server
reads it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from types import MappingProxyType

from modelpress_compression.options import Config, option


@dataclass(frozen=True)
class Device:
    """One row.

    `name`: as a recipe spells it. `title`: what people call it. `backend`: the class (`module:name`) of
    `modelpress_compression.backends`, imported when it is first used. `package`: what must be importable for it, and
    `extra`: what of modelpress installs that; empty where nothing more is needed. `measured`: whether models are timed
    on the device itself. `built`: whether it runs what is built from a model (`backends.base.Builder`), and nothing is
    timed.
    """

    name: str
    title: str
    backend: str
    help: str = ""
    package: str = ""
    extra: str = ""
    measured: bool = True
    built: bool = False

    @property
    def fault(self) -> str:
        """Why there is no such device here, and what to do; empty: it is there."""
        if not self.package or find_spec(self.package) is not None:
            return ""
        return f"{self.title} is not installed where the models run: pip install 'modelpress[{self.extra}]' there."


_ROWS = (
    Device("cpu", "onnxruntime", "modelpress_compression.backends.cpu:OnnxRuntime"),
    Device(
        "cuda",
        "CUDA",
        "modelpress_compression.backends.cpu:OnnxRuntime",
        "distill and the criterion taylor compute on a GPU where torch sees one, else on the CPU with a warning; "
        "onnxruntime measures on the CPU all the same.",
        measured=False,
    ),
    Device(
        "openvino",
        "OpenVINO",
        "modelpress_compression.backends.openvino:OpenVino",
        "OpenVINO on the CPU: models are timed and compared in it, its times decide, and those of onnxruntime stand "
        "beside them.",
        package="openvino",
        extra="openvino",
    ),
    Device(
        "fpga",
        "The FPGA tools",
        "modelpress_compression.backends.fpga:Fpga",
        "a design in fixed point for the part that `part` names, simulated, synthesized, and on ECP5 parts placed and "
        "routed: its cycles and its clock count, and nothing is timed here.",
        package="da4ml",
        extra="fpga",
        built=True,
    ),
)
# As in backends.fpga.parts, which tells what they have.
FPGA_PARTS = ("lfe5u-85f", "lfe5u-45f", "lfe5u-25f", "xc7a35t", "xc7a100t", "xc7z020", "xcku115", "xcvu13p")
DEVICES: Mapping[str, Device] = MappingProxyType({row.name: row for row in _ROWS})


def measured_devices() -> tuple[str, ...]:
    """Names of the devices that models are timed on here."""
    return tuple(row.name for row in DEVICES.values() if row.measured and not row.fault)


@dataclass(frozen=True)
class Target(Config):
    """What the result will run on."""

    device: str = option(
        "cpu",
        1,
        " ".join(f"{row.name}: {row.help}" for row in DEVICES.values() if row.help),
        choices=tuple(DEVICES),
    )
    cpu: str = option(
        "generic",
        2,
        "generic: 8-bit layers give the same answers on CPUs without VNNI, whose products saturate; vnni: such CPUs do "
        "not matter.",
        choices=("generic", "vnni"),
    )
    precision: str = option(
        "default",
        3,
        "In which OpenVINO computes what is in float32. default: bfloat16 on CPUs that have it, which may change "
        "answers; onnxruntime computes in float32 whatever stands here.",
        choices=("default", "float32", "bfloat16"),
    )
    part: str = option(
        FPGA_PARTS[0],
        4,
        "The FPGA that a design is for: Lattice ECP5 (lfe5u), which is placed and routed, or AMD Artix-7 (xc7a), "
        "Zynq-7000 (xc7z), Kintex UltraScale (xcku) or Virtex UltraScale+ (xcvu), which is synthesized.",
        choices=FPGA_PARTS,
    )
    clock_mhz: float = option(100.0, 5, "The clock that the design shall reach, in MHz.", gt=0, lte=1000)
    stage_adders: int = option(
        3, 6, "Adders of a design between two registers: fewer make a faster clock and more cycles.", gte=1, lte=64
    )
