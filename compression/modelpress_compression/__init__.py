"""The engine of modelpress: loads a serialized model, compresses it, and proves what changed. Knows nothing of gRPC.

    from modelpress_compression import load, compress, Recipe

    model = load("model.pt", inputs=["x:float32[batch,1,28,28]"])
    result = compress(model, Recipe.preset("default"), data={"x": samples})
    result.model.save("model.optimized.onnx")
    print(result.report["size_ratio"])

Importing this package is cheap: torch, onnx and onnxruntime are loaded with the first name that needs them.
"""

from __future__ import annotations

import os
from importlib import import_module
from typing import TYPE_CHECKING, Any

# onnxruntime would report names and hashes of users' models to its makers, by a thread that starts with its import.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

if TYPE_CHECKING:
    from modelpress_compression.errors import CompressionError
    from modelpress_compression.inputs import EvaluationData, InputData
    from modelpress_compression.loaders import load
    from modelpress_compression.memory import Memory
    from modelpress_compression.model import Model
    from modelpress_compression.pipeline import Result, compress
    from modelpress_compression.recipe import Recipe
    from modelpress_compression.specs import TensorSpec

__all__ = [
    "CompressionError",
    "EvaluationData",
    "InputData",
    "Memory",
    "Model",
    "Recipe",
    "Result",
    "TensorSpec",
    "compress",
    "load",
]

_HOMES = {
    "CompressionError": "errors",
    "EvaluationData": "inputs",
    "InputData": "inputs",
    "Memory": "memory",
    "Model": "model",
    "Recipe": "recipe",
    "Result": "pipeline",
    "TensorSpec": "specs",
    "compress": "pipeline",
    "load": "loaders",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return __all__
