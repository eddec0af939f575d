"""What the result of a compression will run on: the table of devices, and what a recipe may say of them.

All that the engine knows of a device besides its backend is its row here. This module imports no runtime: the server
reads it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from pathlib import Path
from types import MappingProxyType

from modelpress_compression.options import Config, option


@dataclass(frozen=True)
class Device:
    """One row.

    `name`: as a recipe spells it. `title`: what people call it. `backend`: the class (`module:name`) of
    `modelpress_compression.backends`, imported when it is first used. `package`: what must be importable for it,
    `file`: what must lie in that package, and `extra`: what of modelpress installs that; empty where nothing more is
    needed.
    `nodes`: files of Linux of which one is there with the hardware; none: any machine has it. `spare`: whether jobs run
    on the CPU, with a warning, where it is not there. `built`: whether it runs what is built from a model
    (`backends.base.Builder`), and nothing is timed.

    What passes need to know: `trains`: whether torch computes on it (CUDA); `half`: whether it computes in float16;
    `symmetric`: whether 8-bit layers have no zero points there, and biases in float; `pairs`: whether it makes 8-bit
    layers of QuantizeLinear and DequantizeLinear alone, and computes onnxruntime's operators for them in float, if at
    all; `finds_ranges`: whether it has kernels for ranges that are found in each run.
    """

    name: str
    title: str
    backend: str
    help: str = ""
    package: str = ""
    extra: str = ""
    file: str = ""
    nodes: tuple[str, ...] = ()
    spare: bool = False
    built: bool = False
    trains: bool = False
    half: bool = False
    symmetric: bool = False
    pairs: bool = False
    finds_ranges: bool = True

    @property
    def missing(self) -> str:
        """Why models cannot be timed on it here, and what to do; empty: they can, as far as files tell."""
        install = f"pip install 'modelpress[{self.extra}]' there."
        found = find_spec(self.package) if self.package else None
        if self.package and found is None:
            return f"{self.title} is not installed where the models run: {install}"
        if self.file and not any(Path(folder, self.file).exists() for folder in _folders(found)):
            return f"{self.package} has no {self.title} where the models run: {install}"
        if self.nodes and not any(Path(node).exists() for node in self.nodes):
            return f"{self.title} needs a GPU, and there is none where the models run."
        return ""

    @property
    def fault(self) -> str:
        """Why jobs for it are refused here; empty: they are not."""
        return "" if self.spare else self.missing


def _folders(found: ModuleSpec | None) -> Iterable[str]:
    return () if found is None else found.submodule_search_locations or ()


_GPUS = ("/dev/nvidiactl", "/dev/nvhost-gpu", "/dev/dxg")  # a card, Jetson, WSL
_ROWS = (
    Device("cpu", "onnxruntime", "modelpress_compression.backends.cpu:OnnxRuntime"),
    Device(
        "cuda",
        "CUDA",
        "modelpress_compression.backends.cuda:Cuda",
        "onnxruntime on an NVIDIA GPU: models are timed and compared there, times on the CPU stand beside them, and "
        "what needs gradients computes on the GPU where torch sees it. Without one, everything runs on the CPU, with "
        "a warning.",
        package="onnxruntime",
        extra="cuda",
        file="capi/libonnxruntime_providers_cuda.so",
        nodes=_GPUS,
        spare=True,
        trains=True,
        half=True,
        finds_ranges=False,
    ),
    Device(
        "tensorrt",
        "TensorRT",
        "modelpress_compression.backends.cuda.tensorrt:TensorRt",
        "the same by onnxruntime's provider for TensorRT, and 8-bit layers in the form that it fuses: symmetric, with "
        "biases in float.",
        package="tensorrt",
        extra="tensorrt",
        nodes=_GPUS,
        trains=True,
        half=True,
        symmetric=True,
        pairs=True,
        finds_ranges=False,
    ),
    Device(
        "openvino",
        "OpenVINO",
        "modelpress_compression.backends.openvino:OpenVino",
        "OpenVINO on the CPU: models are timed and compared in it, its times decide, and those of onnxruntime stand "
        "beside them.",
        package="openvino",
        extra="openvino",
        pairs=True,
        finds_ranges=False,
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
    return tuple(row.name for row in DEVICES.values() if not row.missing)


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
        "In which the target computes what is in float32. default: its own choice, which may change answers: bfloat16 "
        "in OpenVINO on CPUs that have it, TF32 on GPUs that have it; onnxruntime on the CPU computes in float32 "
        "whatever stands here. bfloat16: OpenVINO alone.",
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
    hls: str = option(
        "vitis",
        7,
        "The tool for high-level synthesis that the design is written for as well, in C++ by hls4ml: Vitis HLS, Vivado "
        "HLS, oneAPI or Catapult; none: for none.",
        choices=("vitis", "vivado", "oneapi", "catapult", "none"),
    )

    @property
    def saturates(self) -> bool:
        """Whether it may be a CPU whose sums of 8-bit products saturate: 8-bit layers are kept from that."""
        return self.cpu == "generic" and not DEVICES[self.device].symmetric
