"""onnxruntime's provider for TensorRT. What TensorRT does not take runs in CUDA, and what that does not on the CPU.

TensorRT compiles an engine for ranges of shapes. Where a model's inputs have dynamic dimensions they are those of the
feeds, stated as a profile: without it onnxruntime compiles anew, in the middle of a run, whenever a shape goes beyond
what it has seen. Engines are kept in a folder beside the model, so that opening it again does not compile it again.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from modelpress_compression.backends.cpu import OnnxRuntimeRunner
from modelpress_compression.backends.cuda import Cuda, load_libraries, on_device, why_without
from modelpress_compression.errors import InvalidRecipeError
from modelpress_compression.inputs import Array
from modelpress_compression.model import read_graph
from modelpress_compression.runtime import EXECUTION_PROVIDER, Provider, open_comparable, open_session
from modelpress_compression.schema import Violation
from modelpress_compression.target import Target

TENSORRT = "TensorrtExecutionProvider"
ENGINES = "tensorrt-engines"
Shape = tuple[int, ...]


@dataclass(frozen=True)
class Profile:
    """Of each input with dynamic dimensions, the smallest and the largest shape, and the one to be fastest at."""

    least: Mapping[str, Shape]
    usual: Mapping[str, Shape]
    most: Mapping[str, Shape]

    @classmethod
    def of(cls, shapes: Mapping[str, Shape]) -> Profile:
        """These shapes alone."""
        return cls(shapes, shapes, shapes)

    def holds(self, shapes: Mapping[str, Shape]) -> bool:
        """Whether an engine for it takes these shapes."""
        return all(
            low <= extent <= high
            for name, shape in shapes.items()
            for low, extent, high in zip(self.least[name], shape, self.most[name], strict=True)
        )

    def widened(self, shapes: Mapping[str, Shape]) -> Profile:
        """One that takes these, too."""
        least = {name: tuple(map(min, self.least[name], shape)) for name, shape in shapes.items()}
        most = {name: tuple(map(max, self.most[name], shape)) for name, shape in shapes.items()}
        return Profile(least, self.usual, most)

    def options(self) -> dict[str, str]:
        """As onnxruntime takes them: all three, or none."""
        if not self.usual:
            return {}
        ranges = {"min": self.least, "opt": self.usual, "max": self.most}
        return {f"trt_profile_{name}_shapes": _written(shapes) for name, shapes in ranges.items()}


def _written(shapes: Mapping[str, Shape]) -> str:
    return ",".join(f"{name}:{'x'.join(map(str, shape))}" for name, shape in shapes.items())


class TensorRtRunner:
    """A model with its engine, which is made when the first feeds tell the shapes; wider ones make another."""

    note = ""

    def __init__(self, dynamic: list[str], opened: Callable[[Profile], OnnxRuntimeRunner]) -> None:
        self._dynamic, self._opened = dynamic, opened
        self._lock = threading.Lock()
        self._profile: Profile | None = None
        self._runner: OnnxRuntimeRunner | None = None

    def run(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        return self._for(feeds).run(feeds)

    def prepared(self, feeds: Mapping[str, Array]) -> Callable[[], object]:
        return self._for(feeds).prepared(feeds)

    def _for(self, feeds: Mapping[str, Array]) -> OnnxRuntimeRunner:
        shapes = {name: np.shape(feeds[name]) for name in self._dynamic if name in feeds}
        with self._lock:
            if self._profile is None or self._runner is None:
                self._profile = Profile.of(shapes)
                self._runner = self._opened(self._profile)
            elif not self._profile.holds(shapes):
                self._profile = self._profile.widened(shapes)
                self._runner = self._opened(self._profile)
            return self._runner


@dataclass(frozen=True)
class TensorRt(Cuda):
    """See `base.Backend`."""

    label: str = TENSORRT

    @classmethod
    def of(cls, target: Target) -> TensorRt:
        """Raises ImportError without TensorRT, InvalidRecipeError where onnxruntime is built without it."""
        if problem := why_without(TENSORRT):
            raise InvalidRecipeError([Violation("target.device", f"{problem}: pip install 'modelpress[tensorrt]'")])
        import tensorrt  # its libraries, which came with pip, are loaded with it

        del tensorrt
        load_libraries()
        return cls(target.precision == "float32")

    @property
    def remark(self) -> str:
        return "TensorRT compiles each model for the shapes of its samples, which takes seconds to minutes"

    def open(self, path: Path, *, threads: int = 1, comparable: bool = False) -> TensorRtRunner:  # type: ignore[override]
        del threads
        dynamic = [
            value.name or ""
            for value in read_graph(path).inputs
            if value.shape is None or not all(isinstance(extent, int) for extent in value.shape)
        ]

        def opened(profile: Profile) -> OnnxRuntimeRunner:
            engines: dict[str, str] = {
                "trt_engine_cache_enable": "1",
                "trt_engine_cache_path": str(path.parent / ENGINES),
                "trt_timing_cache_enable": "1",
                "trt_timing_cache_path": str(path.parent / ENGINES),
            }
            own: list[Provider] = [(TENSORRT, {**profile.options(), **engines})]
            providers = [*own, *self.providers(), EXECUTION_PROVIDER]
            session = open_comparable(path, providers) if comparable else open_session(path, providers=providers)
            return OnnxRuntimeRunner(on_device(session, TENSORRT))

        return TensorRtRunner(dynamic, opened)
