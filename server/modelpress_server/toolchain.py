"""Versions that jobs run with, read from package metadata: the gRPC process imports none of these packages."""

from __future__ import annotations

import hashlib
import platform
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

PACKAGES = ("modelpress", "torch", "onnx", "onnxruntime", "openvino", "onnx-ir", "onnxscript", "numpy")


@cache
def toolchain() -> dict[str, str]:
    """Package to version, for those that are installed."""
    found = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


@cache
def toolchain_hash() -> bytes:
    """SHA-256 of the versions: results of another toolchain are not taken from the cache."""
    return hashlib.sha256(repr(sorted(toolchain().items())).encode()).digest()


@cache
def made_by() -> bytes:
    """SHA-256 of what a result depends on besides what was asked for: the versions, and the type of the processor.

    Times are measured, and what pays is chosen by them: what one type of processor found does not hold for another.
    """
    names = ("vendor_id", "model name", "flags", "CPU part")
    kind = [line for line in _first_processor() if line.partition("\t")[0] in names]
    return hashlib.sha256(toolchain_hash() + repr([platform.machine(), *kind]).encode()).digest()


def processor_name() -> str:
    """The type of this machine's processor, for people."""
    names = [line.partition(": ")[2] for line in _first_processor() if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _first_processor() -> list[str]:
    try:
        text = Path("/proc/cpuinfo").read_text("utf-8", errors="replace")
    except OSError:
        text = ""
    return text.partition("\n\n")[0].splitlines()
