"""Half precision, in one of two forms; inputs and outputs stay float32.

- computed: weights and arithmetic in float16, by onnxruntime's converter; operators that it knows to fail, nodes
  excluded by the recipe, and nodes whose weights do not fit the type stay float32 between casts.
- stored: weights in float16, a Cast before their first use, arithmetic in float32. onnxruntime folds the casts when it
  loads the model, so that nothing is lost but half of the file. It is what remains where the first does not run, is not
  finite, or strays too far: float16 ends at 65504, and activations can pass it where weights do not.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable

import numpy as np
import onnx
import onnx_ir
import onnx_ir.passes.common
from numpy.typing import NDArray

from modelpress_compression.model import EXTERNAL_DATA_THRESHOLD_BYTES, Model
from modelpress_compression.passes.base import Context, is_excluded
from modelpress_compression.passes.quantize.calibration import spread, with_outputs
from modelpress_compression.passes.quantize.edit import Editor, clean, constant_of
from modelpress_compression.passes.quantize.report import Findings
from modelpress_compression.runtime import run, session_of

# Rounding to float16 leaves about 70 dB; a weight that keeps less has values that overflow or vanish.
MIN_WEIGHT_SQNR_DB = 40.0
# Scalars and the like: a Cast costs more than they save.
_MIN_ELEMENTS = 16
_ACTIVATION_SAMPLES = 4
_STAND_IN = 1e30  # such a number stands for infinity
_FLOAT16_MAX = float(np.finfo(np.float16).max)


def store_in_float16(model: Model, exclude: tuple[str, ...], findings: Findings) -> None:
    """Rewrites every float32 weight of the model's graphs in place into float16 and a Cast."""
    editor = Editor(model)
    for graph in model.graphs():
        for value in list(graph.initializers.values()):
            if not _is_weight(value) or value.is_graph_input() or value.is_graph_output():
                continue
            users = [user for user, _ in value.uses()]
            if any(is_excluded(user.name, exclude) for user in users):
                findings.skip(users[0], "excluded by the recipe")
                continue
            weight = _array(value)
            if reason := why_not_float16(weight):
                findings.skip(users[0], f"weight {value.name!r} {reason}")
                continue
            half = editor.constant(graph, weight.astype(np.float16), f"{value.name}_float16")
            cast = editor.make("Cast", [half], value.name or "weight", attributes={"to": int(onnx_ir.DataType.FLOAT)})
            graph.insert_before(graph[0], cast)
            onnx_ir.convenience.replace_all_uses_with(value, cast.outputs[0])
            findings.changes.update(user.op_type for user in set(users))
    clean(model)


def compute_in_float16(model: Model, exclude: tuple[str, ...], findings: Findings) -> Model | None:
    """A model that computes in float16; None where it is too large for the converter, which works in memory."""
    if model.weight_bytes() > EXTERNAL_DATA_THRESHOLD_BYTES:
        return None
    editor = Editor(model)
    blocked: set[str] = set()
    for node in model.nodes():
        if not node.name:
            node.name = editor.name(f"{node.op_type}_{node.outputs[0].name}")
        reason = "excluded by the recipe" if is_excluded(node.name, exclude) else _why_blocked(node)
        if reason:
            blocked.add(node.name)
            findings.skip(node, reason)
        elif any(value is not None and _is_weight(value) for value in node.inputs):
            findings.changes[node.op_type] += 1
    # The converter appends its casts at the end, which onnxruntime takes and the ONNX standard does not.
    converted = onnx_ir.serde.deserialize_model(_convert(model, blocked))
    onnx_ir.passes.common.TopologicalSortPass()(converted)
    return Model(converted, model.provenance, model.warnings)


def why_not_compute(model: Model, context: Context) -> str | None:
    """Why the model's activations do not fit float16; None: on a few samples they do.

    Looked at in float32: onnxruntime for CPU drops roundings to float16 between two nodes, and with them overflows that
    would show on other devices. Infinities and stand-ins for them, as attention masks have, may overflow.
    """
    names = [
        value.name
        for node in model.graph
        for value in node.outputs
        if value.name and value.dtype == onnx_ir.DataType.FLOAT
    ]
    with session_of(with_outputs(model, names)) as session:
        for feed in spread(context.data, _ACTIVATION_SAMPLES).feeds(batch_size=1):
            context.check_time()
            for name, array in run(session, feed).items():
                magnitudes = np.abs(array[np.abs(array) < _STAND_IN]) if array.dtype.kind == "f" else array[:0]
                if magnitudes.size and float(magnitudes.max()) > _FLOAT16_MAX:
                    return f"tensor {name!r} reaches {float(magnitudes.max()):.3g}, beyond float16's {_FLOAT16_MAX:.0f}"
    return None


def why_not_float16(weight: NDArray[np.float32]) -> str | None:
    """Why an array cannot be float16; None: it can."""
    if not weight.size:
        return None
    largest = float(np.abs(weight).max())
    if not largest <= _FLOAT16_MAX:  # NaN too
        return f"holds values up to {largest:.3g}, beyond float16's {_FLOAT16_MAX:.0f}"
    signal = float(np.square(weight, dtype=np.float64).sum())
    noise = float(np.square(weight - weight.astype(np.float16), dtype=np.float64).sum())
    if noise and 10 * np.log10(signal / noise) < MIN_WEIGHT_SQNR_DB:
        return "holds values too small for float16"
    return None


def _why_blocked(node: onnx_ir.Node) -> str | None:
    for value in node.inputs:
        # Scalars count here: an epsilon that becomes zero, or a factor that loses its digits, is as bad as a weight.
        if value is not None and _is_weight(value, least=1) and (reason := why_not_float16(_array(value))):
            return f"weight {value.name!r} {reason}"
    return None


def _convert(model: Model, blocked: Iterable[str]) -> onnx.ModelProto:
    from onnxruntime.transformers.float16 import convert_float_to_float16

    with warnings.catch_warnings():
        # It warns of each weight that it rounds; `why_not_float16` has judged them all.
        warnings.simplefilter("ignore")
        converted: onnx.ModelProto = convert_float_to_float16(
            onnx_ir.serde.serialize_model(model.ir), keep_io_types=True, node_block_list=sorted(blocked)
        )
    return converted


def _is_weight(value: onnx_ir.Value, least: int = _MIN_ELEMENTS) -> bool:
    tensor = value.const_value
    return (
        value.is_initializer()
        and bool(value.uses())
        and tensor is not None
        and tensor.dtype == onnx_ir.DataType.FLOAT
        and tensor.size >= least
    )


def _array(value: onnx_ir.Value) -> NDArray[np.float32]:
    return np.asarray(constant_of(value), np.float32)
