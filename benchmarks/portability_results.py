"""The results whose portability is looked at: each model in the forms that a job gives, kept in a folder.

    python benchmarks/portability_results.py --models DIR --cache DIR [--only NAME ...]

What lies in the folder is not made again, so that the page can be written anew in the time that the runs take.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from model_evaluation import representative
from modelpress_compression import Recipe, compress, load
from modelpress_compression.errors import CompressionError


@dataclass(frozen=True)
class Case:
    """A model with its eval_NAME.py."""

    name: str
    file: str
    inputs: tuple[str, ...] = ()


CASES = (
    Case("mnist", "mnist/mnist.onnx"),
    Case("fashion", "fashion/fashion.onnx"),
    Case("silero_vad", "files/silero_vad_16k_op15.onnx"),
    Case("ppocr_rec", "files/ppocr_rec.onnx"),
    Case("effnet_lite0", "files/effnet_lite0.traced.pt", ("input:float32[batch,3,224,224]",)),
    Case("minilm", "files/minilm.onnx"),
)
# `float32` is what all others are made from: how far two places are apart without any compression.
FORMS: Mapping[str, Mapping[str, Any]] = {
    "float32": {"steps": [{"fuse": {}}]},
    "static": {"steps": [{"fuse": {}}, {"quantize": {"scheme": "static"}}]},
    "weight_only": {"steps": [{"fuse": {}}, {"quantize": {"scheme": "weight_only"}}]},
    "goal": {"goal": {"objective": "balanced"}},
}
QUICK = {"rounds": 6}


def path_of(cache: Path, case: Case, form: str) -> Path:
    """Where a result lies, or will."""
    return cache / f"{case.name}.{form}.onnx"


def samples_of(cache: Path, case: Case) -> Path:
    """Where the model's representative inputs lie, or will: those that its results were calibrated with."""
    return cache / f"{case.name}.npz"


def build(case: Case, models: Path, cache: Path, forms: Iterable[str] = FORMS) -> list[str]:
    """Makes what is missing of the forms; a sentence on each that could not be made."""
    problems: list[str] = []
    cache.mkdir(parents=True, exist_ok=True)
    missing = [form for form in forms if not path_of(cache, case, form).exists()]
    if not missing:
        return problems
    with tempfile.TemporaryDirectory() as temporary:
        work = Path(temporary)
        model = load(models / case.file, inputs=case.inputs)
        data = representative(case.name, models, model, work)
        shutil.copy(work / "data.npz", samples_of(cache, case))
        for form in missing:
            recipe = Recipe.from_dict({"version": 1, "benchmark": QUICK, **FORMS[form]})
            try:
                result = compress(model, recipe, data=data)
            except CompressionError as error:
                problems.append(f"{case.name}, {form}: {error.message}")
                continue
            result.model.save(work / "made.onnx")
            shutil.move(work / "made.onnx", path_of(cache, case, form))
    return problems


def main() -> None:
    parser = argparse.ArgumentParser(description="The results whose portability is looked at.")
    parser.add_argument("--models", type=Path, required=True, help="folder with the models and their eval_NAME.py")
    parser.add_argument("--cache", type=Path, required=True, help="folder for the results")
    parser.add_argument("--only", nargs="*", default=[], help="names of the models")
    arguments = parser.parse_args()
    for case in CASES:
        if not arguments.only or case.name in arguments.only:
            print(case.name, *build(case, arguments.models.resolve(), arguments.cache), sep="\n  ", flush=True)


if __name__ == "__main__":
    main()
