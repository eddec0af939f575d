"""onnxruntime, as everything here uses it: sessions from files, with errors that a person can act on."""

from __future__ import annotations

import ctypes
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeVar

import numpy as np
import onnx
import onnx_ir
import onnxruntime as ort
from google.protobuf.message import DecodeError
from numpy.typing import NDArray

from modelpress_compression import mapped, prefold
from modelpress_compression.errors import ModelNotRunnableError, UnsupportedOperatorError
from modelpress_compression.inputs import Array, Feeds
from modelpress_compression.model import EXTERNAL_DATA_THRESHOLD_BYTES, Model, file_size_bytes, read_ir
from modelpress_compression.noise import RANDOM, fix_noise, random_nodes
from modelpress_compression.parallel import map_in_order

EXECUTION_PROVIDER = "CPUExecutionProvider"
# Beside 1.5 times the largest model, what sessions may hold that are open at once.
SPARE_BYTES = 512 * 1024**2  # 512 MiB
_UNKNOWN_OPERATOR = re.compile(
    r"(?:No Op registered for|(?P<known>Could not find an implementation for)) (?P<op>[\w.:]+)(?:\((?P<version>\d+)\))?"
    r"(?: node with name '(?P<node>[^']*)')?"
)

_RANDOM_NAMES = tuple(sorted({name.removesuffix("Like").encode() for name in RANDOM}))

Opened = TypeVar("Opened")

Provider = str | tuple[str, dict[str, Any]]  # its name, and its options
CPU_ALONE: tuple[Provider, ...] = (EXECUTION_PROVIDER,)

ort.set_default_logger_severity(3)  # errors only: warnings of onnxruntime speak of its internals


def open_session(
    path: Path,
    *,
    threads: int = 1,
    optimize: bool = True,
    profile: Path | None = None,
    providers: Sequence[Provider] = CPU_ALONE,
) -> ort.InferenceSession:
    """A session on the file, in the first of the `providers` as far as it goes. Raises UnsupportedOperatorError or
    ModelNotRunnableError.

    `optimize=False` runs the graph as it is written, for what must not depend on onnxruntime's own rewriting.
    `profile`: what the name of a profile begins with, which `end_profiling` of the session writes.

    Of a large file onnxruntime holds what it makes of the weights, and no copy of the file, nor of what weights in
    fewer bits stand for (see `prefold`).
    """
    options = _options(threads, optimize, profile)
    if optimize and mapped.is_large(file_size_bytes(path)):
        with TemporaryDirectory(prefix="modelpress-", ignore_cleanup_errors=True) as folder:
            light = _prefolded(path, Path(folder))
            if light is not None:  # its files are mapped, and so read even when they are gone
                return _session(light.proto, options, light.folder, providers)
    if not mapped.is_large(path.stat().st_size):
        return _session(str(path), options, providers=providers)
    path = path.resolve()
    try:
        proto = mapped.from_file(path, path.name)
    except (DecodeError, ValueError) as error:
        raise explain(error) from error
    return _session(proto, options, path.parent, providers)


def _prefolded(path: Path, folder: Path) -> mapped.SessionModel | None:
    """The model in the file with what its weights in fewer bits stand for in the `folder`; None: it has none."""
    try:
        ir = prefold.prefolded(read_ir(path.resolve()), folder / "weights", _evaluated)
    except (DecodeError, ValueError):
        return None  # what is wrong with the file, its session says
    return None if ir is None else mapped.for_session(ir, EXTERNAL_DATA_THRESHOLD_BYTES, finish=lambda proto: None)


def _evaluated(serialized: bytes) -> NDArray[np.generic]:
    """What the one output of a model without inputs holds."""
    found: list[NDArray[np.generic]] = _session(serialized, _options(1, optimize=False)).run(None, {})
    return found[0]


def _options(threads: int, optimize: bool, profile: Path | None = None) -> ort.SessionOptions:
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 4  # failures come as exceptions; the log would repeat them
    # Spinning threads would disturb whatever else is measured in this process.
    options.add_session_config_entry("session.intra_op.allow_spinning", "1" if threads > 1 else "0")
    options.add_session_config_entry("session.force_spinning_stop", "1")
    if profile is not None:
        options.enable_profiling, options.profile_file_prefix = True, str(profile)
    if not optimize:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    return options


def _session(
    model: str | bytes,
    options: ort.SessionOptions,
    folder: Path | None = None,
    providers: Sequence[Provider] = CPU_ALONE,
) -> ort.InferenceSession:
    """`folder`: where a serialized model, which may be large then, finds its external data."""
    if folder is not None:
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(folder))
        _give_back_memory()  # of what was before
    try:
        session = ort.InferenceSession(model, options, providers=list(providers))
    except Exception as error:  # onnxruntime raises a dozen unrelated classes, all mean the same here
        raise explain(error) from error
    if folder is not None:
        _give_back_memory()  # of weights as they were before they were packed
    return session


def _give_back_memory() -> None:
    """What was freed goes to the system: the C library keeps up to a model's size of it for later."""
    if (trim := _malloc_trim()) is not None:
        trim(0)


@cache
def _malloc_trim() -> Callable[[int], int] | None:
    """glibc's; None: the C library is another."""
    try:
        found: Callable[[int], int] = ctypes.CDLL(None).malloc_trim
    except (AttributeError, OSError, TypeError):
        return None
    return found


def open_together(paths: Sequence[Path], openers: Sequence[Callable[[Path], Opened]]) -> list[Opened]:
    """Each file by its opener, in the order of the files. Raises what openers raise.

    The smallest file is opened first: weights in fewer bits, which are unpacked, take twice their room meanwhile.
    """
    order = sorted(range(len(paths)), key=lambda place: file_size_bytes(paths[place]))
    opened = {place: openers[place](paths[place]) for place in order}
    return [opened[place] for place in range(len(paths))]


@contextmanager
def session_of(model: Model, *, threads: int = 1, optimize: bool = True) -> Iterator[ort.InferenceSession]:
    """A session on a model that lies in memory, or partly in files. Raises as `open_session`.

    A small model gets a file, which lives as long as the session. A large one is not written: onnxruntime reads its
    weights where they are. Random operators draw the same numbers in every run (see `noise`).
    """
    if any(random_nodes(model.ir)):
        model = model.clone()
        fix_noise(model.ir)
    with TemporaryDirectory(prefix="modelpress-") as folder:
        light = None
        if mapped.is_large(model.weight_bytes()):
            ir = prefold.prefolded(model.ir, Path(folder) / "weights", _evaluated) if optimize else None
            light = mapped.for_session(ir or model.ir, EXTERNAL_DATA_THRESHOLD_BYTES, finish=model.write_map_types)
        if light is not None:
            yield _session_of(light, threads, optimize)
            return
        path = Path(folder) / "model.onnx"
        model.save(path)
        yield open_session(path, threads=threads, optimize=optimize)


def _session_of(light: mapped.SessionModel, threads: int, optimize: bool) -> ort.InferenceSession:
    """On a large model, of whose weights some lie in memory."""
    options = _options(threads, optimize)
    if not optimize:
        # What is looked into rather than timed needs no weights in another order, which are a copy of them all.
        options.add_session_config_entry("session.disable_prepacking", "1")
    values = {
        name: ort.OrtValue.ortvalue_from_numpy_with_onnx_type(np.ascontiguousarray(array), dtype)
        for name, (array, dtype) in light.arrays.items()
    }
    options.add_external_initializers(list(values), list(values.values()))
    return _session(light.proto, options, light.folder)


def fit_together(sizes_bytes: Iterable[int]) -> bool:
    """Whether sessions on models of these sizes may be open at once. Each may hold as much as the largest has, since
    weights that are stored in fewer bits may be unpacked."""
    sizes = list(sizes_bytes)
    return len(sizes) * max(sizes) <= 1.5 * max(sizes) + SPARE_BYTES


def open_comparable(path: Path, providers: Sequence[Provider] = CPU_ALONE) -> ort.InferenceSession:
    """A session on the file whose outputs can be compared with another model's: random operators draw the same numbers
    in every run. Raises as `open_session`."""
    fixed = with_fixed_noise(path)
    if fixed is None:
        return open_session(path, providers=providers)
    return _session(fixed, _options(1, optimize=True), path.resolve().parent, providers)


def with_fixed_noise(path: Path) -> bytes | None:
    """The model in the file, serialized, with random operators that draw the same numbers in every run; external data
    stays where it is. None: it has no such operators. Raises ModelNotRunnableError."""
    path = path.resolve()
    large = mapped.is_large(path.stat().st_size)
    try:
        serialized = mapped.from_file(path, path.name) if large else path.read_bytes()
        if not any(name in serialized for name in _RANDOM_NAMES):
            return None
        ir = onnx_ir.from_proto(onnx.ModelProto.FromString(serialized))
    except (DecodeError, ValueError) as error:
        raise explain(error) from error
    fix_noise(ir)
    return onnx_ir.to_proto(ir).SerializeToString()


def run(session: ort.InferenceSession, feeds: Mapping[str, Array]) -> dict[str, Array]:
    """All outputs by name; feeds that the graph does not take (any more) are left out. Raises ModelNotRunnableError.

    What is no tensor comes as one array; see `as_array`.
    """
    names = {value.name for value in (*session.get_inputs(), *session.get_overridable_initializers())}
    try:
        # An array without axes may have decayed to a number, which onnxruntime does not take.
        values = session.run(None, {name: np.asarray(array) for name, array in feeds.items() if name in names})
    except Exception as error:  # see open_session
        raise explain(error) from error
    return {output.name: as_array(value) for output, value in zip(session.get_outputs(), values, strict=True)}


def as_array(value: Any) -> Array:
    """What onnxruntime gives for an output, as one array to compare with another model's.

    A sequence of tensors of one shape is stacked, one of several shapes is strung together; maps are their values in
    the order of their keys; an optional that holds nothing is empty.
    """
    if value is None:
        return np.zeros(0, np.float32)
    if isinstance(value, Mapping):
        return np.asarray([value[key] for key in sorted(value)])
    if not isinstance(value, list):
        return np.asarray(value)
    items = [as_array(item) for item in value]
    if len({item.shape for item in items}) <= 1:
        return np.stack(items) if items else np.zeros(0, np.float32)
    return np.concatenate([item.reshape(-1) for item in items])


def run_all(session: ort.InferenceSession, feeds: Iterable[Feeds]) -> Iterator[dict[str, Array]]:
    """Outputs of one feed after the other; several run at once (see `parallel`)."""
    return map_in_order(lambda feed: run(session, feed), feeds)


def explain(error: Exception) -> ModelNotRunnableError | UnsupportedOperatorError:
    """onnxruntime's exception as one of ours, without its source locations and file paths."""
    text = re.sub(r"\[ONNXRuntimeError\] : \d+ : \w+ : ", "", str(error))
    text = re.sub(r"(?:Load model from )?\S*/\S+ failed:", "", text)
    text = re.sub(r"(?:/[\w.+-]+){2,}(?:\.\w+)?(?::\d+)?", "", text)
    text = " ".join(text.split())[:600]
    if match := _UNKNOWN_OPERATOR.search(text):
        where = f"Node {match['node']!r}: " if match["node"] else ""
        version = f" in version {match['version']}" if match["version"] else ""
        said = (
            f"onnxruntime knows {match['op']}{version}, but not on a CPU with the types that it is given here; export "
            f"the model in float32."
            if match["known"]
            else f"onnxruntime has no operator {match['op']}{version} for CPU; export the model with standard ONNX "
            f"operators."
        )
        return UnsupportedOperatorError(
            f"{where}{said}",
            op_type=match["op"],
            node=match["node"] or "",
        )
    return ModelNotRunnableError(f"onnxruntime cannot run the model: {text}")
