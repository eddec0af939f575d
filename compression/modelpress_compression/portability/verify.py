"""Runs one file on the same samples in many places and compares each with this one.

equal      bit for bit
close      no further apart than rounding takes it: as `agreement` has it for floats, and for models that compute
           in 8 bits, where a sum that is rounded the other way is one step in 255 away
differs    further apart than that
refused    onnxruntime does not load or run the file there
not had    there is no such place: what is missing is told
"""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from modelpress_compression.agreement import ATOL, QUANTIZED_ATOL, why_different
from modelpress_compression.encodings.n_bits import computes_in_int8
from modelpress_compression.encodings.operands import is_integer_operator
from modelpress_compression.errors import InvalidInputsError, ModelNotRunnableError
from modelpress_compression.graph.outputs import classification_outputs
from modelpress_compression.graph.synthetic import synthetic_inputs
from modelpress_compression.inputs import Array, Feeds, InputData
from modelpress_compression.loaders import load
from modelpress_compression.loaders.formats import detect
from modelpress_compression.measure.fidelity import compare_answers
from modelpress_compression.model import Model
from modelpress_compression.noise import fix_noise, random_nodes
from modelpress_compression.portability.environments import HERE, LATEST, Environments, NotHadError, Place, Tell
from modelpress_compression.portability.levels import LEVELS
from modelpress_compression.report.environment import cpu_flags, environment
from modelpress_compression.runtime import explain

RUNNER = Path(__file__).parent / "runner.py"
DEFAULT_VERSIONS = ("1.20.1", "1.23.2", LATEST)
DEFAULT_SAMPLES = 16
_REASON_CHARS = 300
Answers = dict[str, Array]


@dataclass(frozen=True)
class Wanted:
    """`versions` of onnxruntime, `latest` among them; `levels`: names of CPUs; `emulated`: by QEMU even those that this
    CPU can stand in for; `samples`: of the data, at most; `place_limit_s`: the longest run in one place."""

    versions: tuple[str, ...] = DEFAULT_VERSIONS
    levels: tuple[str, ...] = tuple(LEVELS)
    emulated: bool = False
    samples: int = DEFAULT_SAMPLES
    place_limit_s: float = 1800.0


@dataclass(frozen=True)
class Row:
    """One place. `verdict`: see above; figures are None where nothing was compared, `top1_agreement` also where no
    output holds classes."""

    place: str
    kind: str
    how: str
    verdict: str
    detail: str = ""
    sqnr_db: float | None = None
    max_abs_error: float | None = None
    top1_agreement: float | None = None
    seconds: float = 0.0


def verify(
    path: Path, data: Mapping[str, Array] | Path | None, wanted: Wanted, cache: Path, tell: Tell = print
) -> dict[str, Any]:
    """The document of the command: `here`, `places`, `portable`. `data`: arrays or an .npz; None: synthetic inputs.

    `cache`: where environments are kept. `tell`: hears what is being done. Raises CompressionError where the file or
    the data cannot be used, or nothing runs here.
    """
    with tempfile.TemporaryDirectory(prefix="modelpress-") as folder:
        work = Path(folder)
        row = detect(path)
        if row.name != "onnx":
            raise InvalidInputsError(f"{path.name} is {row.noun}; verify runs the ONNX file that a job has made of it.")
        model = load(path)
        bench = _bench(path, model, _samples(model, data, wanted.samples, work), work, wanted)
        tell(f"running {len(bench.feeds)} feeds here")
        expected = bench.run(HERE)
        if isinstance(expected, str):
            raise ModelNotRunnableError(f"onnxruntime cannot run the model here: {expected}")
        rows = [_row(bench, expected, *found, tell) for found in _places(wanted, Environments(cache, tell))]
    found = environment()
    ran = [row for row in rows if row.verdict != "not had"]
    return {
        "model": str(path),
        "sha256": model.provenance.sha256,
        "data": "provided" if bench.data.provided else "synthetic",
        "samples": len(bench.feeds) * bench.data.feed_size,
        "computes_in_8_bits": bench.atol == QUANTIZED_ATOL,
        "here": {key: found[key] for key in ("cpu", "instructions", "system", "python", "onnxruntime")},
        "places": [asdict(row) for row in rows],
        "portable": all(row.verdict in ("equal", "close") for row in ran) if ran else None,
    }


@dataclass(frozen=True)
class Bench:
    """What runs in every place. `classes`: outputs that hold classes; `atol`: see `why_different`."""

    path: Path
    data: InputData
    feeds: list[Feeds]
    files: list[str]
    classes: frozenset[str]
    atol: float
    work: Path
    limit_s: float

    def run(self, place: Place) -> Answers | str:
        """The answers there; a text: why there are none. Raises NotHadError where the place has no onnxruntime."""
        with tempfile.TemporaryDirectory(dir=self.work) as folder:
            task = Path(folder) / "task.json"
            outputs = Path(folder) / "outputs.npz"
            wanted = {"model": str(self.path), "feeds": self.files, "outputs": str(outputs), "masks": place.masks}
            task.write_text(json.dumps(wanted), "utf-8")
            try:
                done = subprocess.run(
                    [*place.command, str(RUNNER), str(task)],
                    env={**os.environ, **place.variables},
                    capture_output=True,
                    text=True,
                    errors="replace",
                    timeout=self.limit_s,
                    check=False,
                )
            except subprocess.TimeoutExpired:
                raise NotHadError(f"the samples took more than {self.limit_s:g} s there") from None
            said = _last_document(done.stdout)
            if "missing" in said:
                raise NotHadError(said["missing"])
            if "error" in said:
                return explain(RuntimeError(str(said["error"]))).message[:_REASON_CHARS]
            if done.returncode or not outputs.exists():
                return f"its process ended with code {done.returncode}: {done.stderr.strip()[-_REASON_CHARS:]}"
            with np.load(outputs) as arrays:
                return {name: arrays[name] for name in arrays.files}


def _bench(path: Path, model: Model, data: InputData, work: Path, wanted: Wanted) -> Bench:
    """Samples in files; a model that draws random numbers draws the same ones everywhere."""
    path = path.resolve()
    if any(random_nodes(model.ir)):
        model = model.clone()
        fix_noise(model.ir)
        path = work / "model" / "model.onnx"
        path.parent.mkdir()
        model.save(path)
    feeds = list(data.feeds(1, limit=wanted.samples))
    files = [work / f"feeds-{number}.npz" for number in range(len(feeds))]
    for file, feed in zip(files, feeds, strict=True):
        arrays: dict[str, Any] = feed
        np.savez(file, **arrays)
    steps = any(
        is_integer_operator(node.op_type) or node.op_type == "QuantizeLinear" or computes_in_int8(node)
        for node in model.nodes()
    )
    return Bench(
        path,
        data,
        feeds,
        [str(file) for file in files],
        frozenset(classification_outputs(model.graph)),
        QUANTIZED_ATOL if steps else ATOL,
        work,
        wanted.place_limit_s,
    )


def _samples(model: Model, data: Mapping[str, Array] | Path | None, count: int, work: Path) -> InputData:
    if data is None:
        return synthetic_inputs(model, samples=count)
    if isinstance(data, Path):
        return InputData.read(data, model.inputs, work).spread(count)
    return InputData.from_arrays(data, model.inputs).spread(count)


Found = tuple[str, str, Callable[[], Place]]  # name, kind, and what makes the place


def _places(wanted: Wanted, environments: Environments) -> Iterator[Found]:
    flags = cpu_flags()
    for number in wanted.versions:
        yield f"onnxruntime {number}", "version", partial(environments.of_version, number)
    for name in wanted.levels:
        yield name, "cpu", partial(environments.of_level, LEVELS[name], flags, emulated=wanted.emulated)


def _row(bench: Bench, expected: Answers, name: str, kind: str, make: Callable[[], Place], tell: Tell) -> Row:
    began = time.monotonic()
    try:
        place = make()
        tell(f"running in {place.name}, {place.how}")
        began = time.monotonic()
        answers = bench.run(place)
    except NotHadError as error:
        return Row(name, kind, "", "not had", str(error), seconds=time.monotonic() - began)
    seconds = time.monotonic() - began
    if isinstance(answers, str):
        return Row(place.name, kind, place.how, "refused", answers, seconds=seconds)
    figures = _figures(bench, expected, answers)
    if _identical(expected, answers):
        return Row(place.name, kind, place.how, "equal", **figures, seconds=seconds)
    reasons = [
        f"output {key.partition(':')[2]!r} {reason}"
        for key, array in expected.items()
        if (reason := _why(array, answers.get(key), bench.atol)) is not None
    ]
    verdict = "differs" if reasons else "close"
    return Row(place.name, kind, place.how, verdict, reasons[0] if reasons else "", **figures, seconds=seconds)


def _why(expected: Array, got: Array | None, atol: float) -> str | None:
    return "is missing" if got is None else why_different(expected, got, atol=atol)


def _identical(expected: Answers, got: Answers) -> bool:
    """Whether all numbers are the same; a zero may have another sign."""
    return expected.keys() == got.keys() and all(
        array.dtype == got[key].dtype and np.array_equal(array, got[key], equal_nan=array.dtype.kind in "fc")
        for key, array in expected.items()
    )


def _figures(bench: Bench, expected: Answers, got: Answers) -> dict[str, Any]:
    answers = [(feed, _of_feed(expected, number), _of_feed(got, number)) for number, feed in enumerate(bench.feeds)]
    found = compare_answers(answers, bench.classes, bench.data)
    errors = [one.max_abs_error for one in found.outputs.values() if one.max_abs_error is not None]
    return {
        "sqnr_db": found.sqnr_db if errors else None,
        "max_abs_error": max(errors, default=None),
        "top1_agreement": found.top1_agreement,
    }


def _of_feed(answers: Answers, number: int) -> Answers:
    start = f"{number}:"
    return {key.removeprefix(start): array for key, array in answers.items() if key.startswith(start)}


def _last_document(text: str) -> dict[str, Any]:
    """The runner's answer, which is the last line: onnxruntime may have printed before."""
    try:
        found = json.loads(text.strip().rsplit("\n", 1)[-1])
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}
