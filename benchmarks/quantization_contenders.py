"""Who quantizes: onnxruntime's own tools as a careful user calls them, and ours. Each runs in a process of its own:

    python benchmarks/quantization_contenders.py CONTENDER FOLDER OUTPUT [SAMPLES]

FOLDER is a prepared case (quantization_cases.py), SAMPLES how many of its inputs to calibrate on, if not all. Writes
OUTPUT/model.onnx and OUTPUT/made.json with the wall time, the processor time, the process's peak of resident memory,
and its size before the work began.
"""

from __future__ import annotations

import hashlib
import json
import re
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any

MIN_OPSET = 13  # scales per channel
# Part of the peers' keys in the cache: raise it when anything here changes what they make.
VERSION = 1
BATCH_SIZES = (1, 8)


@dataclass(frozen=True)
class Job:
    """What to quantize: the prepared case's folder. Results go into `output`; `samples`: None means all."""

    folder: Path
    output: Path
    samples: int | None = None

    @property
    def model(self) -> Path:
        return self.folder / "model.onnx"


@dataclass
class Made:
    """What a contender says of its own work. `seconds` of quantizing alone, where it measures that itself."""

    notes: list[str] = field(default_factory=list)
    chosen: str = ""
    steps_s: float | None = None


@dataclass(frozen=True)
class Contender:
    """`make` writes model.onnx into the job's output. `ours`: our engine; `cases`: those it runs on, or all.

    `prepare` imports what `make` needs, so that neither time nor memory of that counts as quantizing.
    """

    name: str
    label: str
    ours: bool
    prepare: Callable[[], None]
    make: Callable[[Job, Made], None]
    cases: tuple[str, ...] = ()

    def key(self, digest: str) -> str:
        """Changes with whatever the result depends on; `digest` is that of the prepared case."""
        made_by = engine_digest() if self.ours else _peers_version()
        return hashlib.sha256(f"{self.name} {digest} {made_by}".encode()).hexdigest()


def _peers_version() -> str:
    return f"onnxruntime {version('onnxruntime')}, onnx {version('onnx')}, {VERSION}"


def engine_digest() -> str:
    import modelpress_compression

    folder = Path(modelpress_compression.__file__).parent
    digest = hashlib.sha256()
    for path in sorted(path for path in folder.rglob("*") if path.suffix in (".py", ".yaml")):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def _import_onnxruntime() -> None:
    import onnxruntime.quantization
    import onnxruntime.quantization.shape_inference

    onnxruntime.set_default_logger_severity(3)


def clean(source: Path, target: Path) -> None:
    """The model as onnxruntime's tools can take it: its opset raised where it is too low.

    Exporters record the shapes of weights beside the weights; `quantize_dynamic` transposes some, checks them against
    the old record and fails, so the records go.
    """
    import onnx

    cleaned = onnx.load(source)
    opset = next((item.version for item in cleaned.opset_import if item.domain in ("", "ai.onnx")), 0)
    if 0 < opset < MIN_OPSET:
        cleaned = onnx.version_converter.convert_version(cleaned, MIN_OPSET)
    weights = {tensor.name for tensor in cleaned.graph.initializer}
    kept = [info for info in cleaned.graph.value_info if info.name not in weights]
    del cleaned.graph.value_info[:]
    cleaned.graph.value_info.extend(kept)
    onnx.save(cleaned, target)


def _preprocessed(job: Job, made: Made) -> Path:
    """A clean model after onnxruntime's own pre-processing; where that fails, without it."""
    from onnxruntime.quantization.shape_inference import quant_pre_process

    current = job.output / "cleaned.onnx"
    clean(job.model, current)
    try:
        quant_pre_process(str(current), str(job.output / "preprocessed.onnx"), skip_symbolic_shape=True)
    except Exception as error:  # noqa: BLE001 - it raises anything; a careful user then goes on without it
        made.notes.append(f"quant_pre_process failed ({_one_line(error)}); done without it")
        return current
    return job.output / "preprocessed.onnx"


def _dynamic(job: Job, made: Made) -> None:
    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic

    quantize_dynamic(
        str(_preprocessed(job, made)),
        str(job.output / "model.onnx"),
        per_channel=True,
        weight_type=QuantType.QInt8,
        # What its error message asks for where types are not inferred.
        extra_options={"DefaultTensorType": onnx.TensorProto.FLOAT},
    )


def _static(method: str) -> Callable[[Job, Made], None]:
    def make(job: Job, made: Made) -> None:
        model = _preprocessed(job, made)
        try:
            _quantize_static(method, model, job)
        except ValueError as error:
            # Its adjusting of weight scales to int32 biases fails on some models, and can be turned off.
            made.notes.append(f"failed at first ({_one_line(error)}); once more without adjusting scales to biases")
            _quantize_static(method, model, job, QDQDisableWeightAdjustForInt32Bias=True)

    return make


def _quantize_static(method: str, model: Path, job: Job, **options: bool) -> None:
    from onnxruntime.quantization import (
        CalibrationDataReader,
        CalibrationMethod,
        QuantFormat,
        QuantType,
        quantize_static,
    )
    from quantization_cases import Prepared

    data = Prepared(job.folder).calibration()
    feeds: Iterator[dict[str, Any]] = (data.spread(job.samples) if job.samples else data).feeds(1)

    class Reader(CalibrationDataReader):  # type: ignore[misc]  # onnxruntime ships no types
        def get_next(self) -> dict[str, Any] | None:
            return next(feeds, None)

    quantize_static(
        str(model),
        str(job.output / "model.onnx"),
        Reader(),
        quant_format=QuantFormat.QDQ,
        activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8,
        per_channel=True,
        calibrate_method=CalibrationMethod[method],
        extra_options=options,
    )


def _import_ours() -> None:
    import torch

    torch.set_num_threads(1)
    for module in ("loaders", "pipeline", "passes.fuse.fuse", "passes.quantize.quantize"):
        import_module(f"modelpress_compression.{module}")


def _ours(recipe: dict[str, Any] | str) -> Callable[[Job, Made], None]:
    """A preset by its name, or a recipe in the YAML shape; by the public API, with the calibration inputs as data."""

    def make(job: Job, made: Made) -> None:
        from modelpress_compression import InputData, Recipe, compress, load
        from modelpress_compression.recipe import Benchmark, Constraints

        loaded = load(job.model)
        data = InputData.read(job.folder / "calibration.npz", loaded.inputs, job.output)
        chosen = Recipe.preset(recipe) if isinstance(recipe, str) else Recipe.from_dict(recipe)
        # `auto` chooses by the speed at the batch sizes that the recipe measures.
        constraints = Constraints(**json.loads((job.folder / "constraints.json").read_text("utf-8")))
        chosen = replace(chosen, benchmark=Benchmark(batch_sizes=BATCH_SIZES), constraints=constraints)
        result = compress(loaded, chosen, data=data)
        result.model.save(job.output / "model.onnx")
        report = result.report
        made.notes += report["warnings"]
        made.notes += [f"{row['name']}: {row['reason']}" for row in report["candidates"] if row["reason"]]
        names = [row["name"] for row in report["candidates"] if row["chosen"]]
        made.chosen = ", ".join(names) if names else "float32" if report["candidates"] else ""
        made.steps_s = sum(step["duration_s"] for step in report["steps"])
        (job.output / "report.json").write_text(json.dumps(report, indent=1), "utf-8")

    return make


_ENTROPY = {"version": 1, "steps": [{"fuse": {}}, {"quantize": {"scheme": "static", "calibration": "entropy"}}]}
OURS = "auto"
PEERS = (
    Contender("ort_dynamic", "onnxruntime dynamic", False, _import_onnxruntime, _dynamic),
    Contender("ort_minmax", "onnxruntime static, minmax", False, _import_onnxruntime, _static("MinMax")),
    Contender("ort_entropy", "onnxruntime static, entropy", False, _import_onnxruntime, _static("Entropy")),
    Contender("ort_percentile", "onnxruntime static, percentile", False, _import_onnxruntime, _static("Percentile")),
)
CONTENDERS = {
    contender.name: contender
    for contender in (
        *PEERS,
        Contender(OURS, "modelpress auto", True, _import_ours, _ours("default")),
        Contender("static", "modelpress static", True, _import_ours, _ours("static-int8")),
        Contender(
            "static_entropy", "modelpress static, entropy", True, _import_ours, _ours(_ENTROPY), cases=("ppocr_rec",)
        ),
    )
}


def _one_line(error: BaseException) -> str:
    text = re.sub(r"(?:/[\w.+-]+){2,}/", "", " ".join(str(error).split()))  # paths of this machine say nothing
    return f"{type(error).__name__}: {text[:300]}"


def _resident_bytes(which: str) -> int:
    """`VmRSS` or its peak, `VmHWM`: of this program alone, unlike getrusage, which keeps what came before exec."""
    match = re.search(rf"^{which}:\s+(\d+) kB", Path("/proc/self/status").read_text("ascii"), re.MULTILINE)
    if match is None:
        raise RuntimeError(f"/proc/self/status has no {which}: memory can be measured on Linux only")
    return int(match[1]) * 1024


def main() -> None:
    contender = CONTENDERS[sys.argv[1]]
    job = Job(Path(sys.argv[2]), Path(sys.argv[3]), *map(int, sys.argv[4:]))
    contender.prepare()
    made = Made()
    outcome: dict[str, Any] = {"outcome": "ok", "error": "", "start_bytes": _resident_bytes("VmRSS")}
    began, began_cpu = time.perf_counter(), time.process_time()
    try:
        contender.make(job, made)
    except Exception as error:  # noqa: BLE001 - whatever a contender raises is its result
        traceback.print_exc()
        outcome |= {"outcome": "failed", "error": _one_line(error)}
    outcome |= {
        "wall_s": time.perf_counter() - began,
        "cpu_s": time.process_time() - began_cpu,
        "peak_bytes": _resident_bytes("VmHWM"),
        "notes": made.notes,
        "chosen": made.chosen,
        "steps_s": made.steps_s,
    }
    (job.output / "made.json").write_text(json.dumps(outcome), "utf-8")


if __name__ == "__main__":
    main()
