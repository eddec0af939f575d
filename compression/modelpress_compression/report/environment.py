"""The machine and the versions that a report's figures were measured with."""

from __future__ import annotations

import platform
import re
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from modelpress_compression.parallel import available_cores

# The instructions that decide how fast, and on some CPUs how exactly, eight-bit arithmetic runs.
_INSTRUCTIONS = ("avx2", "avx512f", "avx512_vnni", "avx_vnni", "amx_int8", "asimddp", "i8mm", "sve")
_PACKAGES = ("modelpress", "torch", "onnx", "onnxruntime", "openvino", "numpy")


def environment() -> dict[str, Any]:
    """The report's `environment`. `cores` are those that this process may use; a version is "" where not installed."""
    processors = _processors()
    flags = _flags(processors)
    return {
        "cpu": _field(processors, "model name") or platform.processor() or platform.machine(),
        "cores": available_cores(),
        "instructions": [name for name in _INSTRUCTIONS if name in flags],
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        **{name: _version(name) for name in _PACKAGES},
    }


def cpu_flags() -> set[str]:
    """The features of the CPU, as Linux spells them; none where it does not say."""
    return _flags(_processors())


def _flags(processors: str) -> set[str]:
    return set(re.findall(r"[\w]+", _field(processors, "flags") or _field(processors, "Features")))


def _processors() -> str:
    try:
        return Path("/proc/cpuinfo").read_text("utf-8", errors="replace")
    except OSError:
        return ""


def _field(processors: str, name: str) -> str:
    match = re.search(rf"^{re.escape(name)}\s*:\s*(.+)$", processors, re.MULTILINE)
    return match[1].strip() if match else ""


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""
