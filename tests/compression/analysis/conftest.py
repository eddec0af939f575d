"""Small graphs, written as text or made with torch."""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable

import numpy as np
import onnx
import onnx_ir
import pytest
import torch
from modelpress_compression.model import Model, Provenance

ModelFromText = Callable[..., Model]


@pytest.fixture
def model_from_text() -> ModelFromText:
    """Builds a model from ONNX's text form; `weights` become initializers of the main graph."""

    def build(text: str, weights: dict[str, np.ndarray] | None = None) -> Model:
        proto = onnx.parser.parse_model(text)
        for name, array in (weights or {}).items():
            proto.graph.initializer.append(onnx.numpy_helper.from_array(array, name))
        return Model(onnx_ir.from_proto(proto), Provenance("onnx", "", 0))

    return build


@pytest.fixture
def model_from_torch() -> Callable[[torch.nn.Module, tuple[int, ...]], Model]:
    """Exports a module with one float input x whose batch is dynamic."""

    def export(module: torch.nn.Module, shape: tuple[int, ...]) -> Model:
        buffer = io.BytesIO()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch deprecates the exporter that needs no tracing of symbols
            torch.onnx.export(
                module.eval(),
                (torch.zeros(shape),),
                buffer,
                dynamo=False,
                input_names=["x"],
                dynamic_axes={"x": {0: "batch"}},
            )
        return Model(onnx_ir.from_proto(onnx.load_from_string(buffer.getvalue())), Provenance("onnx", "", 0))

    return export
