"""OpenVINO under onnxruntime's name, for the evaluation scripts of openvino_peers.py: what they use of a session.

`OPENVINO_PRECISION`: f32, or nothing for OpenVINO's own choice.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import openvino


class SessionOptions:
    """Takes any setting."""

    intra_op_num_threads: int = 0


@dataclass(frozen=True)
class Value:
    """An input: dynamic dimensions are words."""

    name: str
    shape: list[int | str]


class InferenceSession:
    """A compiled model."""

    def __init__(self, path: str, options: SessionOptions | None = None, providers: Sequence[str] = ()) -> None:
        del providers
        settings: dict[str, Any] = {"PERFORMANCE_HINT": "LATENCY"}
        if options is not None and options.intra_op_num_threads:
            settings["INFERENCE_NUM_THREADS"] = options.intra_op_num_threads
        if precision := os.environ.get("OPENVINO_PRECISION"):
            settings["INFERENCE_PRECISION_HINT"] = precision
        self._compiled = openvino.Core().compile_model(path, "CPU", settings)
        self._request = self._compiled.create_infer_request()

    def get_inputs(self) -> list[Value]:
        return [
            Value(port.get_any_name(), [d.get_length() if d.is_static else "dynamic" for d in port.get_partial_shape()])
            for port in self._compiled.inputs
        ]

    def run(self, _outputs: None, feeds: Mapping[str, Any]) -> list[np.ndarray]:
        taken = {name for port in self._compiled.inputs for name in port.get_names()}
        self._request.infer({name: np.asarray(array) for name, array in feeds.items() if name in taken})
        return [np.array(tensor.data) for tensor in self._request.output_tensors]
