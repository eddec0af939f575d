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
    on the device itself.
    """

    name: str
    title: str
    backend: str
    help: str = ""
    package: str = ""
    extra: str = ""
    measured: bool = True

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
)
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
