"""OpenVINO on the CPU. It reads the same ONNX file.

Where the CPU computes in bfloat16 fast, OpenVINO takes it for what a model states in float32, unless it is told
otherwise; `label` names what it takes.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import openvino
from openvino.frontend import FrontEndManager

from modelpress_compression.errors import ModelNotRunnableError, UnsupportedOperatorError
from modelpress_compression.inputs import Array
from modelpress_compression.mapped import is_large
from modelpress_compression.model import file_size_bytes, read_graph
from modelpress_compression.runtime import as_array, with_fixed_noise
from modelpress_compression.target import Target

_DEVICE = "CPU"
_TYPES = {"float32": openvino.Type.f32, "bfloat16": openvino.Type.bf16, "float16": openvino.Type.f16}
_NAMES = {kind.get_type_name(): name for name, kind in _TYPES.items()}
_UNKNOWN_OPERATORS = re.compile(r"No conversion rule found for operations?:? (?P<ops>[^\n]+)")
_FAILED_OPERATORS = re.compile(r"Conversion is failed for: (?P<ops>[^\n]+)")
_UNKNOWN_SHAPES = re.compile(r"rank.{0,40}(?:static|known)|has to be known", re.DOTALL)
_LAST_REASON = 300  # characters of it
_MOST_SHAPES = 4  # of one model that are compiled at a time


class OpenVinoRunner:
    """A compiled model. Each thread has a request of its own, since one runs once at a time."""

    note = ""

    def __init__(self, compiled: openvino.CompiledModel, outputs: list[str]) -> None:
        self._compiled, self._outputs = compiled, outputs
        self._taken = {name: port for port in compiled.inputs for name in port.get_names()}
        self._local = threading.local()

    def run(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        try:
            self._request.infer(self._inputs(feeds), share_inputs=True)
            values = [self._request.get_output_tensor(index) for index in range(len(self._outputs))]
            return {name: as_array(_copied(value)) for name, value in zip(self._outputs, values, strict=True)}
        except RuntimeError as error:
            raise explain(error) from error

    def prepared(self, feeds: Mapping[str, Array]) -> Callable[[], object]:
        request = self._request
        tensors = [(port, openvino.Tensor(array, shared_memory=True)) for port, array in self._inputs(feeds).items()]

        def run_once() -> object:
            # Tensors that are made before: `infer` would make them of arrays, 20 microseconds for each.
            for port, tensor in tensors:
                request.set_tensor(port, tensor)
            return request.infer(share_outputs=True)

        return run_once

    @property
    def _request(self) -> Any:
        if not hasattr(self._local, "request"):
            self._local.request = self._compiled.create_infer_request()
        return self._local.request

    def _inputs(self, feeds: Mapping[str, Array]) -> dict[Any, Array]:
        # What OpenVINO shares must lie in one piece and be writable, which data that is mapped from a file is not.
        return {
            self._taken[name]: np.require(array, requirements=("C", "W"))
            for name, array in feeds.items()
            if name in self._taken
        }


class FixedShapeRunner:
    """A model that OpenVINO converts only where it knows the shapes of all inputs: those of the feeds, each in turn."""

    note = (
        "OpenVINO reads the model only with fixed input shapes, since it finds no rank for some values otherwise. It "
        "was measured with the shapes of the samples; an application must fix them too, as with "
        "openvino.convert_model and its option input."
    )

    def __init__(self, path: Path, inputs: list[str], compiled: Callable[[openvino.Model], OpenVinoRunner]) -> None:
        self._path, self._inputs, self._compiled = path, inputs, compiled
        self._lock = threading.Lock()
        self._runners: dict[tuple[tuple[int, ...], ...], OpenVinoRunner] = {}

    def run(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        return self._runner_for(feeds).run(feeds)

    def prepared(self, feeds: Mapping[str, Array]) -> Callable[[], object]:
        return self._runner_for(feeds).prepared(feeds)

    def _runner_for(self, feeds: Mapping[str, Array]) -> OpenVinoRunner:
        shapes = {name: np.shape(feeds[name]) for name in self._inputs if name in feeds}
        key = tuple(shapes.values())
        with self._lock:
            if key not in self._runners:
                if len(self._runners) >= _MOST_SHAPES:
                    del self._runners[next(iter(self._runners))]
                self._runners[key] = self._compiled(_with_shapes(self._path, shapes))
            return self._runners[key]


def _with_shapes(path: Path, shapes: Mapping[str, tuple[int, ...]]) -> openvino.Model:
    """The model in the file with these shapes of its inputs. Raises as `OpenVino.open`."""
    try:
        frontend = FrontEndManager().load_by_framework("onnx")
        given = frontend.load(str(path))
        for name, shape in shapes.items():
            place = given.get_place_by_tensor_name(name)
            if place is not None:
                given.set_partial_shape(place, openvino.PartialShape(list(shape)))
        return openvino.Model(frontend.convert(given))
    except RuntimeError as error:
        raise explain(error) from error


@dataclass(frozen=True)
class OpenVino:
    """See `base.Backend`. `precision`: as in the recipe's target."""

    precision: str = "default"
    elsewhere: bool = False

    @classmethod
    def of(cls, target: Target) -> OpenVino:
        """With the target's precision."""
        return cls(target.precision)

    @property
    def label(self) -> str:
        return f"OpenVINO {self._computes_in}"

    @property
    def remark(self) -> str:
        said = "by its own choice" if self.precision == "default" else "as the target's precision says"
        closer = "" if self._computes_in == "float32" else "; target.precision float32 is closer to onnxruntime"
        return f"OpenVINO {openvino.__version__.split('-')[0]} computes in {self._computes_in} here, {said}{closer}"

    @property
    def _computes_in(self) -> str:
        if self.precision != "default":
            return self.precision
        chosen: str = _core().get_property(_DEVICE, "INFERENCE_PRECISION_HINT").get_type_name()
        return _NAMES.get(chosen, chosen)

    def open(self, path: Path, *, threads: int = 1, comparable: bool = False) -> OpenVinoRunner | FixedShapeRunner:
        settings: dict[str, Any] = {
            "INFERENCE_NUM_THREADS": threads,
            "NUM_STREAMS": 1,
            "PERFORMANCE_HINT": "LATENCY",
            "ENABLE_CPU_PINNING": False,  # other models' threads would be pinned to the same cores
        }
        if self.precision != "default":
            settings["INFERENCE_PRECISION_HINT"] = _TYPES[self.precision]
        fixed = with_fixed_noise(path) if comparable and not is_large(file_size_bytes(path)) else None
        try:
            model = _core().read_model(str(path) if fixed is None else fixed)
        except RuntimeError as error:
            if fixed is not None or not _UNKNOWN_SHAPES.search(str(error)):
                raise explain(error) from error
            model = None
        graph = read_graph(path)
        compiled = partial(_compiled, settings=settings, outputs=[value.name or "" for value in graph.outputs])
        if model is None:
            return FixedShapeRunner(path, [value.name or "" for value in graph.inputs], compiled)
        return compiled(model)


def _compiled(model: openvino.Model, settings: Mapping[str, Any], outputs: list[str]) -> OpenVinoRunner:
    try:
        compiled = _core().compile_model(model, _DEVICE, settings)
    except RuntimeError as error:
        raise explain(error) from error
    if len(outputs) != len(compiled.outputs):
        raise ModelNotRunnableError(
            f"OpenVINO makes {len(compiled.outputs)} outputs of the model's {len(outputs)}; it cannot be compared."
        )
    return OpenVinoRunner(compiled, outputs)


@cache
def _core() -> openvino.Core:
    return openvino.Core()


def _copied(tensor: Any) -> Array:
    """The request's next run overwrites what it holds."""
    if tensor.element_type == openvino.Type.string:
        return np.asarray(tensor.str_data)
    return np.array(tensor.data)


def explain(error: Exception) -> ModelNotRunnableError | UnsupportedOperatorError:
    """OpenVINO's exception as one of ours, without its source locations and conditions."""
    text = str(error)
    for pattern in (_UNKNOWN_OPERATORS, _FAILED_OPERATORS):
        if match := pattern.search(text):
            operators = re.sub(r"-\d+\b", "", match["ops"].strip())[:200]
            return UnsupportedOperatorError(
                f"OpenVINO does not run these operators as the model has them: {operators}. Take the target cpu, or "
                f"export the model without them.",
                op_type=re.split(r"[ ,]", operators)[0],
            )
    lines = [line for line in text.splitlines() if line and not re.match(r"Exception from|Check '|Summary", line)]
    reason = re.sub(r"(?:/?[\w.+-]+/){2,}[\w.+-]+(?::\d+)?:?", "", " ".join(" ".join(lines).split()))
    return ModelNotRunnableError(f"OpenVINO cannot run the model: {reason[:_LAST_REASON] or 'it gives no reason'}")
