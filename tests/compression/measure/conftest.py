"""Small models in files."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from modelpress_compression.inputs import InputData
from modelpress_compression.specs import parse_specs

SaveModel = Callable[..., Path]


@pytest.fixture
def save_model(tmp_path: Path) -> SaveModel:
    """Writes a model given in ONNX's text form; `weights` become its initializers."""

    def save(graph: str, weights: dict[str, np.ndarray] | None = None, name: str = "model") -> Path:
        proto = onnx.parser.parse_model(f'<ir_version: 8, opset_import: ["" : 17]> {graph}')
        for key, array in (weights or {}).items():
            proto.graph.initializer.append(onnx.numpy_helper.from_array(np.asarray(array), key))
        path = tmp_path / f"{name}.onnx"
        onnx.save(proto, path)
        return path

    return save


@pytest.fixture
def samples() -> Callable[..., InputData]:
    """InputData for one input x, given its spec and array."""

    def make(spec: str, array: np.ndarray) -> InputData:
        specs = parse_specs([spec])
        return InputData.from_arrays({specs[0].name: array}, specs)

    return make
