"""Prints the versions that the checks ran with, on one line: `.venv/bin/python .ci/versions.py`."""

from __future__ import annotations

import platform
from importlib.metadata import version

PACKAGES = (
    *("torch", "onnx", "onnx-ir", "onnxscript", "onnxruntime"),
    *("protobuf", "grpcio", "numpy", "hypothesis", "pytest"),
)

if __name__ == "__main__":
    print(", ".join([f"python {platform.python_version()}", *(f"{name} {version(name)}" for name in PACKAGES)]))
