"""Models that quantization is measured on, each as one ONNX file with inputs to calibrate on and inputs held out.

- `real`: trained models with a task metric; DIR holds them and an `eval_NAME.py` each, as in real_models.py.
- `packaged`: trained models out of installed packages (rapidocr-onnxruntime 1.4.4, magika 1.0.3), without labels.
- `architecture`: the architectures of the pruning benchmark, with random weights.

Every fourth sample is held out: fidelity and latency are measured on it and nothing is calibrated on it. The task
metric comes from a set of its own, which neither holds.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

import numpy as np
from model_evaluation import evaluate
from modelpress_compression.inputs import Array, InputData
from modelpress_compression.specs import TensorSpec
from quantization_inputs import file_bytes, line_crops, pages

Kind = Literal["real", "packaged", "architecture"]
HELD_OUT_EVERY = 4
ARCHITECTURE_SAMPLES = 48


class NotInstalledError(Exception):
    """A case whose package is not there."""


@dataclass(frozen=True)
class Case:
    """One model. `metric`: what eval_NAME.py prints, "" where there is none; `inputs`: for files that record none.

    `source` gives the file in the folder of models. `embeds`: the first output is token vectors of an encoder, whose
    nearest neighbours count; `mask_threshold`: the first output is a mask at this threshold; `classifies`: it holds
    class scores, also where the engine does not see that.
    """

    name: str
    kind: Kind
    source: Callable[[Path], Path]
    metric: str = ""
    inputs: tuple[str, ...] = ()
    samples: Callable[[Path], Mapping[str, Array]] | None = None
    embeds: bool = False
    mask_threshold: float | None = None
    classifies: bool = False


@dataclass(frozen=True)
class Prepared:
    """The files of a case in the cache: model.onnx, calibration.npz, held_out.npz, constraints.json (of the recipe),
    specs.json."""

    folder: Path

    @property
    def model(self) -> Path:
        return self.folder / "model.onnx"

    @property
    def digest(self) -> str:
        """Of all that a contender is made from."""
        names = ("model.onnx", "model.onnx.data", "calibration.npz")
        digests = [file_digest(self.folder / name) for name in names if (self.folder / name).exists()]
        return hashlib.sha256("".join(digests).encode()).hexdigest()

    def calibration(self) -> InputData:
        return self._data("calibration.npz")

    def held_out(self) -> InputData:
        return self._data("held_out.npz")

    def _data(self, name: str) -> InputData:
        specs = tuple(
            TensorSpec(spec["name"], spec["dtype"], tuple(spec["shape"]))
            for spec in json.loads((self.folder / "specs.json").read_text("utf-8"))
        )
        with np.load(self.folder / name) as arrays:
            return InputData.from_arrays(dict(arrays), specs)


def file_digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def prepare(case: Case, models: Path, cache: Path) -> Prepared:
    """Converts the model without any step and splits its samples; once, then taken from the cache.

    Raises NotInstalledError.
    """
    from modelpress_compression import load

    prepared = Prepared(cache / case.name)
    prepared.folder.mkdir(parents=True, exist_ok=True)
    # Which class random weights name means nothing.
    constraints = {"metric": "cosine"} if case.kind == "architecture" else {}
    (prepared.folder / "constraints.json").write_text(json.dumps(constraints), "utf-8")
    if (prepared.folder / "specs.json").exists():
        return prepared
    model = load(case.source(models), case.inputs)
    names = {spec.name for spec in model.inputs}
    arrays = dict(_samples(case, models, prepared.folder))
    if len(arrays) > 1:  # a single array fits a single input, whatever its name is
        arrays = {name: array for name, array in arrays.items() if name in names}
    data = InputData.from_arrays(arrays, model.inputs)
    held_out = np.arange(len(data)) % HELD_OUT_EVERY == HELD_OUT_EVERY - 1
    model.save(prepared.model)
    for name, chosen in (("calibration.npz", ~held_out), ("held_out.npz", held_out)):
        np.savez(prepared.folder / name, **{key: array[chosen] for key, array in data.arrays.items()})
    # The last to be written: it says that the others are complete.
    specs = [{"name": spec.name, "dtype": spec.dtype, "shape": list(spec.shape)} for spec in model.inputs]
    (prepared.folder / "specs.json").write_text(json.dumps(specs), "utf-8")
    return prepared


def _samples(case: Case, models: Path, folder: Path) -> Mapping[str, Array]:
    if case.samples is not None:
        return case.samples(models)
    evaluate(case.name, models, "--make-calib", str(folder / "samples.npz"))
    with np.load(folder / "samples.npz") as arrays:
        return dict(arrays)


def _real(name: str, file: str, metric: str, *inputs: str, embeds: bool = False) -> Case:
    return Case(name, "real", lambda models: models / file, metric, inputs, embeds=embeds)


def _packaged(package: str, file: str) -> Callable[[Path], Path]:
    def find(models: Path) -> Path:
        found = find_spec(package)  # finds the folder without running the package, which wants more than is needed
        if found is None or not found.submodule_search_locations:
            raise NotInstalledError(f"package {package} is not installed")
        return Path(found.submodule_search_locations[0]) / file

    return find


def _architectures(cache: Path) -> list[Case]:
    # torch, timm and transformers take seconds to import: only when asked for.
    from architectures import ARCHITECTURES, Architecture, drawn_samples, exported

    def case(architecture: Architecture) -> Case:
        return Case(
            architecture.name,
            "architecture",
            lambda models: exported(architecture, "dynamo", cache / "exports")[0],
            samples=lambda models: drawn_samples(architecture, ARCHITECTURE_SAMPLES),
        )

    return [case(architecture) for architecture in ARCHITECTURES.values()]


_OCR = "rapidocr_onnxruntime"
_TRAINED = (
    _real("mnist", "mnist/mnist_traced.pt", "top-1", "input:float32[batch,1,28,28]"),
    _real("fashion", "fashion/fashion.onnx", "top-1"),
    _real("effnet_lite0", "files/effnet_lite0.traced.pt", "top-1", "input:float32[batch,3,224,224]"),
    _real("minilm", "files/minilm.onnx", "retrieval top-1", embeds=True),
    _real("silero_vad", "files/silero_vad_16k_op15.onnx", "ROC AUC"),
    _real("ppocr_rec", "files/ppocr_rec.onnx", "words read right"),
    Case(
        "ppocr_det",
        "packaged",
        _packaged(_OCR, "models/ch_PP-OCRv4_det_infer.onnx"),
        samples=pages,
        mask_threshold=0.3,
    ),
    Case(
        "ppocr_cls",
        "packaged",
        _packaged(_OCR, "models/ch_ppocr_mobile_v2.0_cls_infer.onnx"),
        inputs=("x:float32[batch,3,48,192]",),
        samples=line_crops,
        classifies=True,
    ),
    Case(
        "magika",
        "packaged",
        _packaged("magika", "models/standard_v3_3/model.onnx"),
        samples=file_bytes,
        classifies=True,
    ),
)


def cases(kinds: list[Kind], only: list[str], cache: Path) -> list[Case]:
    """The cases of these kinds; `only`: parts of names."""
    found = [case for case in _TRAINED if case.kind in kinds]
    if "architecture" in kinds:
        found += _architectures(cache)
    return [case for case in found if not only or any(part in case.name for part in only)]
