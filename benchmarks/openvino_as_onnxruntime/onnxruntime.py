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
from openvino.frontend import FrontEndManager


class SessionOptions:
    """Takes any setting."""

    intra_op_num_threads: int = 0


@dataclass(frozen=True)
class Value:
    """An input: dynamic dimensions are words."""

    name: str
    shape: list[int | str]


class InferenceSession:
    """A model, compiled for the shapes of the feeds where OpenVINO converts it with none else."""

    def __init__(self, path: str, options: SessionOptions | None = None, providers: Sequence[str] = ()) -> None:
        del providers
        self._settings: dict[str, Any] = {"PERFORMANCE_HINT": "LATENCY"}
        if options is not None and options.intra_op_num_threads:
            self._settings["INFERENCE_NUM_THREADS"] = options.intra_op_num_threads
        if precision := os.environ.get("OPENVINO_PRECISION"):
            self._settings["INFERENCE_PRECISION_HINT"] = precision
        self._path = path
        self._requests: dict[tuple[tuple[int, ...], ...], openvino.InferRequest] = {}
        self._names = {value.name for value in self.get_inputs()}
        try:
            self._any_shape = self._compiled(path)
        except RuntimeError:
            self._any_shape = None

    def get_inputs(self) -> list[Value]:
        _, model = self._loaded()
        return [
            Value(
                place.get_names()[0],
                [d.get_length() if d.is_static else "dynamic" for d in model.get_partial_shape(place)],
            )
            for place in model.get_inputs()
        ]

    def run(self, _outputs: None, feeds: Mapping[str, Any]) -> list[np.ndarray]:
        given = {name: np.asarray(array) for name, array in feeds.items() if name in self._names}
        request = self._any_shape or self._of_shapes(given)
        request.infer(given)
        return [np.array(tensor.data) for tensor in request.output_tensors]

    def _of_shapes(self, given: Mapping[str, np.ndarray]) -> openvino.InferRequest:
        key = tuple(array.shape for array in given.values())
        if key not in self._requests:
            frontend, model = self._loaded()
            for place in model.get_inputs():
                model.set_partial_shape(place, openvino.PartialShape(list(given[place.get_names()[0]].shape)))
            self._requests[key] = self._compiled(openvino.Model(frontend.convert(model)))
        return self._requests[key]

    def _loaded(self) -> tuple[Any, Any]:
        frontend = FrontEndManager().load_by_framework("onnx")
        return frontend, frontend.load(self._path)

    def _compiled(self, model: str | openvino.Model) -> openvino.InferRequest:
        return openvino.Core().compile_model(model, "CPU", self._settings).create_infer_request()
