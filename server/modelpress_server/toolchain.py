"""Versions that jobs run with, read from package metadata: the gRPC process imports none of these packages."""

from __future__ import annotations

import hashlib
from functools import cache
from importlib.metadata import PackageNotFoundError, version

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
