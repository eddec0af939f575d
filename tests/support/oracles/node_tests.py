"""ONNX's own test models through the engine: loaded, fused, quantized by every scheme, pruned, and compared.

Most node tests give weights as inputs, and all of them are small: no pass would find anything to do. So a test is taken
in up to four forms:

    as it is
    frozen               all inputs but the first are initializers
    between products     frozen; x A B in place of the first input x, and y C D in place of the first output y
    between convolutions the same by convolutions of 1x1, along the channels

A B and C D are the identity up to rounding, and wide enough to be quantized and pruned. What stands between them must
let both through: its own kernel in 8 bits, its channels cut, or a reason why not.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import onnx
from modelpress_compression.agreement import why_different
from modelpress_compression.channels import Group, Indices, cut, find_groups
from modelpress_compression.errors import CompressionError
from modelpress_compression.inputs import InputData
from modelpress_compression.loaders import load
from modelpress_compression.model import Model
from modelpress_compression.passes.base import Context
from modelpress_compression.recipe import Step
from modelpress_compression.runtime import explain, open_session
from modelpress_compression.search.steps import apply_step, broken
from onnxruntime import InferenceSession

from oracles import conformance
from oracles.masking import masked
from oracles.node_test_forms import Subject, between, frozen

# Kinds of tests beside those of single nodes, in folders of the onnx package.
_FOLDERS = ("simple", "pytorch-converted", "pytorch-operator")
_LIGHT = "light"
_OUTPUT = "_output_0.pb"
# A third of the channels, and no rounding: layers of tests have few.
_PRUNING = {"structure": "channel", "sparsity": 0.3, "round_to": 1, "min_channels": 1, "repair": "none"}


@dataclass(frozen=True)
class Treatment:
    """One step of a recipe, and how far outputs may move: the norm of the difference over that of the output.

    0: they must agree up to rounding. None: any finite outputs of the same types and shapes, where units are removed.
    """

    step: Step
    tolerance: float | None


def _quantize(tolerance: float, **config: Any) -> Treatment:
    return Treatment(Step("quantize", config), tolerance)


TREATMENTS: Mapping[str, Treatment] = MappingProxyType(
    {
        "fuse": Treatment(Step("fuse", {}), 0.0),
        "static": _quantize(0.2, scheme="static"),
        "dynamic": _quantize(0.1, scheme="dynamic"),
        "8 bits": _quantize(0.05, scheme="weight_only", weights="int8"),
        "4 bits": _quantize(0.3, scheme="weight_only", weights="int4", block_size=16),
        "float16": _quantize(0.01, scheme="float16"),
        "prune": Treatment(Step("prune", _PRUNING), None),
    }
)
# A random cut of the same share, held against the masked model, to which it is equal.
CUT = "cut"
_KEPT = 0.7
# For calibration: the test's inputs and fresh ones. The first two are what results are compared on: ranges that so few
# samples leave open are not what is tested.
_SAMPLES = 4
_MOVES = 8  # how often inputs are moved to see whether outputs jump
_NOISE = 1e-6  # what cancelled terms leave
# What is never right: an exception that is none of the engine's, and a result that is another model's.
WRONG = ("error", "wrong")


@dataclass(frozen=True)
class Outcome:
    """How a subject fared under one treatment, or in loading.

    equal, close     it came back changed, and computes the same, or nearly
    alone            it came back as it was
    undone           the engine dropped a result that does not run, and said so
    refused          an error of the engine's, for people
    not run          onnxruntime does not run the test as it is written
    no oracle        there is nothing to compare with: the masked model gives no numbers, as 0 * acosh(0) does, or the
                     original's own outputs move as far when its inputs move a little
    wrong            another model came back
    error            an exception that is none of the engine's
    """

    subject: str
    operator: conformance.Key
    treatment: str
    status: str
    detail: str = ""


def subjects() -> Iterator[Subject]:
    """All of them, those of the node tests first."""
    for case, operator in cases():
        yield from subjects_of(case, operator)
    yield from light_subjects()


def cases() -> Iterator[tuple[Any, conformance.Key]]:
    """The tests, and what they are about."""
    for case in conformance.cases():
        yield case, conformance.operator_of(case)
    for kind in _FOLDERS:
        for case in conformance.folder_cases(kind):
            yield case, ("", kind)


def subjects_of(case: Any, operator: conformance.Key) -> Iterator[Subject]:
    """A test in its forms."""
    inputs, expected = case.data_sets[0]
    given = [value.name for value in case.model.graph.input]
    feeds = {name: conformance.feed_of(value) for name, value in zip(given, inputs, strict=False)}
    outputs = [value.name for value in case.model.graph.output]
    wanted = {name: conformance.feed_of(value) for name, value in zip(outputs, expected, strict=True)}
    subject = Subject(case.name, operator, case.model, feeds, wanted, conformance.is_random(case))
    yield subject
    if (made := frozen(subject)) is not None:
        yield made
    for convolutions in (False, True):
        if (surrounded := between(made or subject, convolutions=convolutions)) is not None:
            yield surrounded


def light_subjects() -> Iterator[Subject]:
    """Large networks of the first years, whose weights the graphs themselves make of constants."""
    folder = Path(onnx.__file__).parent / "backend" / "test" / "data" / _LIGHT
    for path in sorted(folder.glob("*.onnx")):
        proto = onnx.load(path)
        have = {tensor.name for tensor in proto.graph.initializer}
        rng = np.random.default_rng(0)
        feeds = {
            value.name: rng.standard_normal([dim.dim_value for dim in value.type.tensor_type.shape.dim], np.float32)
            for value in proto.graph.input
            if value.name not in have
        }
        yield Subject(path.stem, ("", _LIGHT), proto, feeds, {})


def journey(subject: Subject, treatments: Sequence[str] = (*TREATMENTS, CUT)) -> list[Outcome]:
    """The outcome of loading, and, where that went well, of each treatment."""
    with tempfile.TemporaryDirectory(prefix="modelpress-") as folder:
        return list(_Journey(subject, Path(folder)).outcomes(treatments))


class _Journey:
    """One subject on its way; `folder` is its own."""

    def __init__(self, subject: Subject, folder: Path) -> None:
        self._subject, self._folder = subject, folder

    def outcomes(self, treatments: Sequence[str]) -> Iterator[Outcome]:
        path = self._folder / "given.onnx"
        path.write_bytes(self._subject.proto.SerializeToString())
        try:
            model = load(path)
        except CompressionError as error:
            yield self._refused(path, error)
            return
        except Exception as error:  # noqa: BLE001  what is looked for
            yield self._outcome("load", "error", f"{type(error).__name__}: {error}")
            return
        loaded = self._loaded(model)
        yield loaded
        if loaded.status == "equal":
            for name in treatments if model.inputs else ():
                yield self._cut(model) if name == CUT else self._treated(name, model)

    def _outcome(self, treatment: str, status: str, detail: str = "") -> Outcome:
        text = " ".join(detail.split())[:400]
        return Outcome(self._subject.name, self._subject.operator, treatment, status, text)

    def _refused(self, path: Path, error: CompressionError) -> Outcome:
        """Refused where onnxruntime would have run it; "not run" where it would not."""
        try:
            _run(open_session(path), self._subject.inputs)
        except CompressionError as reason:
            return self._outcome("load", "not run", reason.message)
        return self._outcome("load", "refused", error.message)

    def _loaded(self, model: Model) -> Outcome:
        """Whether the loaded model gives what the test expects, or else what onnxruntime gives for the file."""
        loaded = self._folder / "loaded.onnx"
        model.save(loaded)
        given = self._folder / "given.onnx"
        try:
            got, failure = _run(open_session(loaded), self._subject.inputs), ""
        except CompressionError as error:
            got, failure = {}, error.message
        problem = failure or self._difference(self._subject.expected, got, 0.0)
        if problem is None:
            return self._outcome("load", "equal")
        try:
            before = _run(open_session(given), self._subject.inputs)
        except CompressionError as error:
            return self._outcome("load", "not run", error.message)
        if not failure and self._difference(before, got, 0.0) is None:
            return self._outcome("load", "equal", f"onnxruntime gives others than the test: {problem}")
        return self._outcome("load", "wrong", problem)

    def _treated(self, name: str, model: Model) -> Outcome:
        treatment, original = TREATMENTS[name], self._folder / "loaded.onnx"
        target = self._folder / name.replace(" ", "-") / "model.onnx"
        try:
            data = self._data(model)
            context = Context(data, self._folder, original=model)
            record = apply_step(treatment.step, model, original, context, target)
        except CompressionError as error:
            return self._outcome(name, "refused", f"{type(error).__name__}: {error.message}")
        except Exception as error:  # noqa: BLE001  what is looked for
            return self._outcome(name, "error", f"{type(error).__name__}: {error}")
        if any("was undone" in warning for warning in record.warnings):
            return self._outcome(name, "undone", "; ".join(record.warnings))
        if not record.changes:
            return self._outcome(name, "alone", _reasons(record.skipped, record.warnings))
        if (record.model.inputs, record.model.outputs) != (model.inputs, model.outputs):
            return self._outcome(name, "wrong", f"it takes {record.model.inputs}, and gives {record.model.outputs}")
        return self._compared(name, original, record.path, treatment.tolerance)

    def _data(self, model: Model) -> InputData:
        """The test's inputs, and others of the same range that the model takes: one sample tells no ranges."""
        session, feeds = open_session(self._folder / "loaded.onnx"), [self._subject.inputs]
        for seed in range(1, _SAMPLES):
            other = fresh(self._subject.inputs, seed)
            try:
                _run(session, other)
            except CompressionError:
                break
            feeds.append(other)
        arrays = {spec.name: np.stack([np.asarray(feed[spec.name]) for feed in feeds]) for spec in model.inputs}
        return InputData(model.inputs, arrays)

    def _cut(self, model: Model) -> Outcome:
        try:
            analysis = find_groups(model)
            kept = {group.id: _random_units(group) for group in analysis.groups}
            if not any(len(kept[group.id]) < group.units for group in analysis.groups):
                return self._outcome(CUT, "alone", "; ".join(dict.fromkeys(one.reason for one in analysis.frozen)))
            smaller, reference = cut(model, kept), masked(model, analysis, kept, dict(self._subject.inputs))
        except CompressionError as error:
            return self._outcome(CUT, "refused", f"{type(error).__name__}: {error.message}")
        except Exception as error:  # noqa: BLE001  what is looked for
            return self._outcome(CUT, "error", f"{type(error).__name__}: {error}")
        paths = self._folder / "masked.onnx", self._folder / "cut.onnx"
        for path, one in zip(paths, (reference, smaller), strict=True):
            one.save(path)
        if broken(paths[0], self._data(model), self._folder / "loaded.onnx") is not None:
            return self._outcome(CUT, "no oracle")
        return self._compared(CUT, *paths, 0.0, finite_alone=True)

    def _compared(
        self, name: str, original: Path, result: Path, tolerance: float | None, *, finite_alone: bool = False
    ) -> Outcome:
        """`finite_alone`: what is not finite in the original is not compared. A mask makes NaN of infinity."""
        try:
            before, after = open_session(original), open_session(result)
        except CompressionError as error:
            return self._outcome(name, "wrong", error.message)
        for feeds in (self._subject.inputs, fresh(self._subject.inputs, 1)):
            try:
                expected = _run(before, feeds)
            except CompressionError:
                continue  # it does not take these numbers
            try:
                got = _run(after, feeds)
                if finite_alone:
                    got = {name: where_finite(expected.get(name), value) for name, value in got.items()}
                problem = self._difference(expected, got, tolerance)
            except CompressionError as error:
                problem = error.message
            if problem is not None and tolerance and self._is_chaotic(before, feeds, expected, tolerance):
                return self._outcome(name, "no oracle", problem)
            if problem is not None:
                return self._outcome(name, "wrong", problem)
        return self._outcome(name, "close" if tolerance or tolerance is None else "equal")

    def _is_chaotic(
        self, session: InferenceSession, feeds: Mapping[str, Any], expected: Mapping[str, Any], tolerance: float
    ) -> bool:
        """Whether the original's outputs move beyond the tolerance when its inputs move by a tenth of it.

        So it is where values are rounded or compared, and where numbers near 0 are divided by.
        """
        try:
            return any(
                self._difference(expected, _run(session, _moved(feeds, tolerance / 10, seed)), tolerance) is not None
                for seed in range(_MOVES)
            )
        except CompressionError:
            return True

    def _difference(self, expected: Mapping[str, Any], got: Mapping[str, Any], tolerance: float | None) -> str | None:
        if expected and list(expected) != list(got):
            return f"outputs {list(got)} instead of {list(expected)}"
        values = None if self._subject.random else tolerance
        for name, wanted in expected.items():
            if (problem := difference(wanted, got[name], values)) is not None:
                return f"output {name!r} {problem}"
        return None


def _run(session: InferenceSession, feeds: Mapping[str, Any]) -> dict[str, Any]:
    """Outputs by name: arrays, lists for sequences, None for an empty optional. Raises as `runtime.run`."""
    wanted = {value.name for value in session.get_inputs()}
    try:
        values = session.run(None, {name: value for name, value in feeds.items() if name in wanted})
    except Exception as error:
        raise explain(error) from error
    return {output.name: value for output, value in zip(session.get_outputs(), values, strict=True)}


def where_finite(wanted: Any, got: Any) -> Any:
    """`got`, with what `wanted` holds where that is not finite."""
    arrays = isinstance(wanted, np.ndarray) and isinstance(got, np.ndarray) and wanted.dtype.kind == "f"
    if not arrays or (wanted.shape, wanted.dtype) != (got.shape, got.dtype):
        return got
    return np.where(np.isfinite(wanted), got, wanted)


def difference(wanted: Any, got: Any, tolerance: float | None) -> str | None:
    """How far `got` is off, None where it is not; `tolerance` as in `Treatment`."""
    if wanted is None or isinstance(wanted, list):
        return _difference_of_lists(wanted, got, tolerance)
    wanted, got = np.asarray(wanted), np.asarray(got)
    if tolerance == 0.0:
        return why_different(wanted, got)
    if (wanted.shape, wanted.dtype) != (got.shape, got.dtype):
        return f"is {got.dtype} {got.shape} instead of {wanted.dtype} {wanted.shape}"
    if tolerance is None or wanted.dtype.kind != "f":
        return None  # a value that moves a little flips comparisons, and rounds to another integer
    a, b = wanted.astype(np.float64), got.astype(np.float64)
    finite = np.isfinite(a)
    if not np.isfinite(b[finite]).all():
        return "is not finite where the original's is"
    norm = float(np.linalg.norm(a[finite]))
    off = float(np.linalg.norm(a[finite] - b[finite]))
    return None if off <= tolerance * norm + _NOISE else f"is off by {off / (norm or 1.0):.3g} of its norm"


def _difference_of_lists(wanted: Any, got: Any, tolerance: float | None) -> str | None:
    """Of sequences and empty optionals."""
    if (wanted is None) != (got is None) or len(wanted or ()) != len(got or ()):
        return f"is {got!r} instead of {wanted!r}"[:200]
    for one, other in zip(wanted or (), got or (), strict=True):
        if (problem := difference(one, other, tolerance)) is not None:
            return problem
    return None


def _moved(inputs: Mapping[str, Any], share: float, seed: int) -> dict[str, Any]:
    """Float inputs with every number higher or lower by `share` of the largest."""
    rng = np.random.default_rng(seed)
    return {
        name: (array + share * np.abs(array).max(initial=0) * rng.choice((-1, 1), array.shape)).astype(array.dtype)
        if isinstance(array, np.ndarray) and array.dtype.kind == "f"
        else array
        for name, array in inputs.items()
    }


def fresh(inputs: Mapping[str, Any], seed: int) -> dict[str, Any]:
    """Other inputs that the model takes: the numbers of float inputs in another order, within the range as given.

    Integers stay: they may be positions, extents or lengths.
    """
    rng = np.random.default_rng(seed)
    return {
        name: rng.permuted(array.reshape(-1)).reshape(array.shape)
        if isinstance(array, np.ndarray) and array.dtype.kind == "f"
        else array
        for name, array in inputs.items()
    }


def _random_units(group: Group) -> Indices:
    count = max(1, round(_KEPT * group.units))
    return np.sort(np.random.default_rng([0, group.units]).choice(group.units, count, replace=False)).astype(np.int64)


def _reasons(skipped: Sequence[Any], warnings: Sequence[str]) -> str:
    return "; ".join([*dict.fromkeys(skip.reason for skip in skipped), *warnings])
