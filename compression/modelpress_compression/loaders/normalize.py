"""One shape for every graph, so that everything downstream may rely on it:

- operator set 13 to 26, IR version at most 13 (what onnxruntime loads);
- no functions: they are inlined;
- an initializer that is an input too is a default that callers may override; weights that an exporter listed among the
  inputs are weights alone;
- tensors of Constant nodes are initializers, in subgraphs too;
- no node ends in outputs without a name, which a file may list and which are gone from any copy of it;
- strided views are Reshapes where they are nothing else;
- scales of biases are constants, where a file has them as products of two others;
- every node has a name, and no two values of a graph share one;
- shapes and types are inferred as far as ONNX can.
"""

from __future__ import annotations

from collections.abc import Sequence

import onnx
import onnx_ir
from onnx_ir.passes import common

from modelpress_compression.errors import CompressionError, ModelNotRunnableError, RejectedModelError
from modelpress_compression.graph import bias_scales
from modelpress_compression.graph.read import is_op
from modelpress_compression.graph.shapes import infer_shapes, values_of
from modelpress_compression.loaders.quiet import quiet
from modelpress_compression.loaders.strided_views import reshape_strided_views
from modelpress_compression.loaders.verify import Disagreement, compare_models
from modelpress_compression.model import GIVEN_NAME, MAX_IR_VERSION, MAX_OPSET, Model

MIN_IR_VERSION = 8  # below 4 initializers had to be inputs, 8 brought functions; nothing that is written needs older
OVERRIDABLE_IR_VERSION = 4
MIN_OPSET = 13  # QuantizeLinear with an axis
# 17 has LayerNormalization; 13 is tried where that fails.
_TARGETS = (17, MIN_OPSET)

_RESIZE_WITH_COORDINATES = 11

_NO_NAMES = ("", "?", "-1", "None", "unk")


def normalize(model: Model) -> Model:
    """The same model in the shape described above; `model` itself is at most sorted.

    Raises RejectedModelError, ModelNotRunnableError.
    """
    try:
        with quiet():
            # Some tools append nodes behind their users; onnxruntime takes that, the standard and `clone` do not.
            common.TopologicalSortPass()(model.ir)
            model = model.clone()
            model = _forget_listed_weights(model)
            ir = model.ir
            ir.ir_version = max(MIN_IR_VERSION, min(ir.ir_version, MAX_IR_VERSION))
            _inline(ir)
            _forget_false_names(ir)
            _tidy(ir)
    except (onnx_ir.passes.PassError, RuntimeError, ValueError, KeyError, TypeError, AssertionError) as error:
        raise RejectedModelError(
            f"The ONNX graph is not valid: {root_cause(error)}", finding="INVALID_GRAPH"
        ) from error
    model = fit_opset(model)
    with quiet():
        _tidy(model.ir)
    name_nodes(model)
    infer_shapes(model.ir)
    reshape_strided_views(model)
    bias_scales.write_out(model)
    return model


def root_cause(error: BaseException) -> str:
    """What was wrong in the end: the errors around it print whole weights."""
    while error.__cause__ is not None:
        error = error.__cause__
    return " ".join(str(error).split())[:300]


def _inline(ir: onnx_ir.Model) -> None:
    if ir.functions:
        common.InlinePass()(ir)
        ir.functions.clear()
        common.RemoveUnusedOpsetsPass()(ir)


def _forget_false_names(ir: onnx_ir.Model) -> None:
    """Dimensions of inputs called `?` or -1 are unknown: two of them need not be the same. Nowhere is one negative."""
    for value in ir.graph.inputs:
        if value.shape is not None:
            value.shape = onnx_ir.Shape(
                None if isinstance(dim, onnx_ir.SymbolicDim) and dim.value in _NO_NAMES else dim for dim in value.shape
            )
    for value in values_of(ir):
        if value.shape is not None and any(isinstance(dim, int) and dim < 0 for dim in value.shape):
            value.shape = onnx_ir.Shape(None if isinstance(dim, int) and dim < 0 else dim for dim in value.shape)


def _forget_listed_weights(model: Model) -> Model:
    """Exporters of old list every weight among the inputs, which makes none of them a default of the caller's."""
    graph = model.graph
    listed = [value for value in graph.inputs if value.name in graph.initializers]
    if not listed or not (_had_to_list(model) or _lists_all(graph, listed)):
        return model
    for value in listed:
        graph.inputs.remove(value)
    if _had_to_list(model):
        return model
    return model.with_warnings(
        f"All {len(listed)} constants of the model are listed among its inputs, as defaults that callers may override: "
        f"they were taken for weights, and are constants from here on. To keep one as an input, list that one alone."
    )


def _had_to_list(model: Model) -> bool:
    """Before version 4 every initializer was an input, and nobody could override it."""
    return model.ir.ir_version < OVERRIDABLE_IR_VERSION


def _lists_all(graph: onnx_ir.Graph, listed: Sequence[onnx_ir.Value]) -> bool:
    """Whether these are all that the graph knows, and large enough to be weights."""
    return len(listed) == len(graph.initializers) and any(
        value.const_value is not None and len(value.const_value.shape) > 1 for value in listed
    )


def _tidy(ir: onnx_ir.Model) -> None:
    common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(ir)
    for node in ir.graph.all_nodes():
        named = [index for index, value in enumerate(node.outputs, 1) if value.name != ""]
        node.resize_outputs(max(named, default=len(node.outputs)))
    for graph in (ir.graph, *ir.graph.subgraphs()):
        for value in graph.initializers.values():
            if value.const_value is not None and not value.is_graph_input():
                value.shape = onnx_ir.Shape(value.const_value.shape.numpy())
                value.dtype = value.const_value.dtype


def name_nodes(model: Model) -> None:
    """Names for nodes without one: `OpType_N`, counted per operator in the graph's order, so the same every time."""
    taken: set[str] = set()
    unnamed: list[onnx_ir.Node] = []
    for node in model.nodes():
        if node.name and node.name not in taken:
            taken.add(node.name)
        else:
            unnamed.append(node)
    counts: dict[str, int] = {}
    for node in unnamed:
        stem = node.name or node.op_type
        while (name := f"{stem}_{counts.setdefault(stem, 0)}") in taken:
            counts[stem] += 1
        node.name = name
        node.meta[GIVEN_NAME] = name
        taken.add(name)


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
    if model.opset < _RESIZE_WITH_COORDINATES <= target:
        _resize_as_before(converted)
    return converted


def _resize_as_before(converted: Model) -> None:
    """Up to opset 10 Upsample and Resize had one way to find coordinates. The converter leaves that to the defaults of
    opset 11, which are others."""
    for node in converted.nodes():
        if is_op(node, "Resize"):
            node.attributes["coordinate_transformation_mode"] = onnx_ir.AttrString(
                "coordinate_transformation_mode", "asymmetric"
            )
            node.attributes["nearest_mode"] = onnx_ir.AttrString("nearest_mode", "floor")
