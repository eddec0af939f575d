"""The operator set's version: raised where per-channel quantization needs it, lowered to what onnxruntime loads."""

from __future__ import annotations

import onnx
import onnx_ir

from modelpress_compression.errors import CompressionError, ModelNotRunnableError
from modelpress_compression.loaders.quiet import quiet
from modelpress_compression.loaders.verify import Disagreement, compare_models
from modelpress_compression.model import MAX_OPSET, Model

MIN_OPSET = 13  # QuantizeLinear with an axis
# 17 has LayerNormalization; 13 is tried where that fails.
_TARGETS = (17, MIN_OPSET)


def fit_opset(model: Model) -> Model:
    """The model with an operator set from 13 to 26, or as it was, with a warning, where raising it fails.

    Raises ModelNotRunnableError where it cannot be lowered far enough.
    """
    if model.opset > MAX_OPSET:
        return _lowered(model)
    if model.opset >= MIN_OPSET or model.opset == 0:  # 0: no operator of the default domain
        return model
    for target in _TARGETS:
        converted = _convert(model, target)
        if converted is not None and _agrees(model, converted):
            return converted
    return model.with_warnings(
        f"The model's operator set {model.opset} could not be raised to {MIN_OPSET}; per-channel quantization needs "
        f"{MIN_OPSET}, so export the model with opset {_TARGETS[0]} or later for the best result."
    )


def _agrees(before: Model, after: Model) -> bool:
    try:
        compare_models(before, after)
    except Disagreement:
        return False
    except CompressionError:
        return False  # the converter wrote something that does not load
    return True


def _lowered(model: Model) -> Model:
    """Operators that have not changed since opset 26 mean the same there; only the number needs to be lowered."""
    newer = sorted({node.op_type for node in model.nodes() if node.domain == "" and _since(node, model) > MAX_OPSET})
    if not newer:
        lowered = model.clone()
        lowered.ir.opset_imports[""] = MAX_OPSET
        return lowered
    converted = _convert(model, MAX_OPSET)
    if converted is None or any(_since(node, model) > MAX_OPSET for node in converted.nodes() if node.domain == ""):
        raise ModelNotRunnableError(
            f"The model uses operator set {model.opset}; onnxruntime loads at most {MAX_OPSET}, and "
            f"{', '.join(newer[:5])} cannot be converted. Export it with opset_version={MAX_OPSET} or less."
        )
    return converted


def _since(node: onnx_ir.Node, model: Model) -> int:
    version = min(model.opset, onnx.defs.onnx_opset_version())
    return int(onnx.defs.get_schema(node.op_type, version, "").since_version)


def _convert(model: Model, target: int) -> Model | None:
    """The model with operator set `target`, or None where the converter fails."""
    from onnxscript import version_converter

    converted = model.clone()
    outputs = [value.name for value in model.graph.outputs]
    try:
        with quiet():
            version_converter.convert_version(converted.ir, target, fallback=True)
    except Exception:  # noqa: BLE001  the converter raises whatever its adapters run into; all mean "not converted"
        return None
    if converted.opset != target or [value.name for value in converted.graph.outputs] != outputs:
        return None
    return converted
