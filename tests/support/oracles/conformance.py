"""ONNX's own backend node tests, run on the executor: the yardstick for its operators."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir
from modelpress_compression.errors import CompressionError
from modelpress_compression.executor import Executor, NotExecutableError, unsupported_nodes
from modelpress_compression.model import Model, Provenance
from onnx import numpy_helper

# Random by definition: only type and shape can be compared.
_RANDOM = frozenset(
    ("Bernoulli", "RandomUniformLike", "RandomNormalLike", "RandomUniform", "RandomNormal", "Multinomial")
)
# Two units in the last place, as in ONNX's own runner.
_BFLOAT16_RTOL = 2**-6
# The expected values are themselves float32 sums, with noise beyond the tolerance where the exact value is 0: they are
# compared with one unit in the last place of the largest.
_FLOAT32_NOISE = frozenset(("DFT",))
Key = tuple[str, str]


@dataclass(frozen=True)
class Outcome:
    """How one case went: `status` is passed, failed or unsupported; `detail` says why it did not pass."""

    name: str
    operator: Key
    status: str
    detail: str = ""


@functools.cache
def cases() -> tuple[Any, ...]:
    """All node tests of the installed onnx package; its generators warn of the overflows that they test."""
    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore")
        from onnx.backend.test import loader

        return tuple(sorted(loader.load_model_tests(kind="node"), key=lambda case: case.name))


def folder_cases(kind: str) -> Iterator[Any]:
    """The tests of one kind that the onnx package holds as files, with model and data read."""
    from onnx.backend.test import loader

    for case in sorted(loader.load_model_tests(kind=kind), key=lambda case: case.name):
        folder = Path(str(case.model_dir))
        model = onnx.load(folder / "model.onnx")
        yield replace(case, model=model, data_sets=[_data_set(model, folder / "test_data_set_0")])


def _data_set(model: onnx.ModelProto, folder: Path) -> tuple[list[Any], list[Any]]:
    """Inputs and outputs of a test that is a folder; inputs with a default come last and have no file."""
    sides = (("input", model.graph.input), ("output", model.graph.output))
    inputs, outputs = (
        [_read(path, value.type) for path, value in _files(folder, side, values)] for side, values in sides
    )
    return inputs, outputs


def _files(
    folder: Path, side: str, values: Sequence[onnx.ValueInfoProto]
) -> Iterator[tuple[Path, onnx.ValueInfoProto]]:
    paths = (folder / f"{side}_{index}.pb" for index in range(len(values)))
    return ((path, value) for path, value in zip(paths, values, strict=True) if path.exists())


def _read(path: Path, kind: onnx.TypeProto) -> Any:
    if kind.HasField("sequence_type"):
        sequence = onnx.SequenceProto()
        sequence.ParseFromString(path.read_bytes())
        return numpy_helper.to_list(sequence)
    tensor = onnx.TensorProto()
    tensor.ParseFromString(path.read_bytes())
    return tensor


def operator_of(case: Any) -> Key:
    """The operator that a case is about; an expanded case, which runs a function body, stands for the function."""
    return _operators()[case.name]


def is_expanded(case: Any) -> bool:
    """Whether the case runs the function body of an operator instead of the operator."""
    return "_expanded" in case.name


@functools.cache
def _operators() -> dict[str, Key]:
    direct = {case.name: _main_operator(case) for case in cases()}
    return {name: direct.get(name.partition("_expanded")[0], key) for name, key in direct.items()}


def _main_operator(case: Any) -> Key:
    """The first node that does more than to provide constants."""
    nodes = case.model.graph.node
    node = next((node for node in nodes if node.op_type not in ("Constant", "Identity")), nodes[0])
    return ("" if node.domain == "ai.onnx" else node.domain, node.op_type)


def check(case: Any) -> Outcome:
    """Runs a case with every one of its data sets."""
    key = operator_of(case)
    model = Model(onnx_ir.from_proto(case.model), Provenance("onnx", "", 0))
    if missing := unsupported_nodes(model):
        return Outcome(case.name, key, "unsupported", ", ".join(sorted({str(node) for node in missing})))
    try:
        executor = Executor(model)
        for inputs, expected in case.data_sets:
            _compare(case, executor, inputs, expected)
    except NotExecutableError as error:
        return Outcome(case.name, key, "unsupported", error.message)
    except (CompressionError, AssertionError) as error:
        return Outcome(case.name, key, "failed", str(error))
    return Outcome(case.name, key, "passed")


def _compare(case: Any, executor: Executor, inputs: Sequence[Any], expected: Sequence[Any]) -> None:
    names = [value.name for value in case.model.graph.input]
    feeds = {name: feed_of(value) for name, value in zip(names, inputs, strict=True)}
    found = list(executor.run(feeds).values())
    random = is_random(case)
    _require(len(found) == len(expected), f"{len(found)} outputs instead of {len(expected)}")
    for got, wanted in zip(found, expected, strict=True):
        _same(got, feed_of(wanted), case, values=not random)


def _require(holds: bool, message: str) -> None:
    if not holds:
        raise AssertionError(message)


def is_random(case: Any) -> bool:
    """Whether only types and shapes of the outputs can be compared."""
    return any(_is_random(node) for node in case.model.graph.node) and "zero_ratio" not in case.name


def _is_random(node: Any) -> bool:
    return node.op_type in _RANDOM or (node.op_type == "Dropout" and len(node.input) == 3)


def feed_of(value: Any) -> Any:
    """Arrays of ONNX's own types; sequences as lists; an empty optional as None."""
    if isinstance(value, onnx.TensorProto):
        return onnx_ir.from_proto(value).numpy()
    if isinstance(value, list):
        return [feed_of(item) for item in value]
    return value


def _same(got: Any, wanted: Any, case: Any, *, values: bool) -> None:
    if wanted is None or isinstance(wanted, list):
        _require((got is None) == (wanted is None), f"{type(got).__name__} instead of {type(wanted).__name__}")
        _require(len(got or []) == len(wanted or []), "a sequence of another length")
        for a, b in zip(got or [], wanted or [], strict=True):
            _same(a, b, case, values=values)
        return
    got, wanted = np.asarray(got), np.asarray(wanted)
    _require(got.dtype == wanted.dtype, f"type {got.dtype} instead of {wanted.dtype}")
    _require(got.shape == wanted.shape, f"shape {got.shape} instead of {wanted.shape}")
    if values and wanted.dtype.kind in "OUS":
        np.testing.assert_array_equal(got, wanted)
    elif values:
        exact = wanted.dtype.kind in "biu"
        wide = np.int64 if exact and wanted.dtype != np.uint64 else (wanted.dtype if exact else np.float64)
        if wanted.dtype.kind == "c":
            wide = np.complex128
        rtol = _BFLOAT16_RTOL if wanted.dtype.name == "bfloat16" else case.rtol
        atol = case.atol
        if operator_of(case)[1] in _FLOAT32_NOISE:
            atol = max(atol, float(np.finfo(np.float32).eps * np.abs(wanted).max(initial=0.0)))
        with np.errstate(all="ignore"):
            np.testing.assert_allclose(got.astype(wide), wanted.astype(wide), rtol=rtol, atol=atol)
