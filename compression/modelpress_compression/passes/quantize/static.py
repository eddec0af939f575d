"""Static quantization: ranges from calibration, convolutions and matrix products in integers from one to the next.

1. Choose the heavy nodes and lay the plan (plan.py).
2. Observe the tensors of the plan on the data (calibration.py); nodes that read infinite or NaN values fall out.
3. Measure each heavy node's own loss (sensitivity.py). A Conv below the floor stays float32; a MatMul or Gemm that
   loses too much gets its range at run time instead (dynamic.py): as fast in onnxruntime, and outliers of other rows
   do not cost it its resolution.
4. Lay the plan again with what is left, and write it (qdq.py).

What has no static kernel (LSTM, Attention, embeddings, products inside subgraphs) is quantized dynamically.
"""

from __future__ import annotations

from collections.abc import Iterable

import onnx_ir

from modelpress_compression.model import Model
from modelpress_compression.passes.base import Context, is_excluded
from modelpress_compression.passes.quantize import dynamic
from modelpress_compression.passes.quantize.affine import ActivationParameters, activation_parameters
from modelpress_compression.passes.quantize.calibration import observe
from modelpress_compression.passes.quantize.edit import Editor
from modelpress_compression.passes.quantize.observers import METHODS, Histogram
from modelpress_compression.passes.quantize.plan import HEAVY, Plan, is_light, make_plan, why_not_static
from modelpress_compression.passes.quantize.qdq import QdqWriter, guard_float_nodes
from modelpress_compression.passes.quantize.report import Findings
from modelpress_compression.passes.quantize.sensitivity import sqnr_per_node
from modelpress_compression.passes.quantize.weights import WeightStore
from modelpress_compression.techniques import QuantizeConfig

# A Conv that keeps less than this of its own output is a catastrophe, not a compression: in the models that keep their
# accuracy (EfficientNet-Lite, PP-OCR, Silero) none lies below 23 dB.
CONV_FLOOR_DB = 15.0
# A product below this is more exact with a range of its own in each run, at about the same speed.
PRODUCT_FLOOR_DB = 30.0


def quantize_static(model: Model, config: QuantizeConfig, context: Context, editor: Editor, findings: Findings) -> None:
    """Quantizes in place."""
    store = WeightStore(editor, config, context.target)
    heavy = _choose(model, config, findings)
    plan, parameters = _calibrate(model, config, context, heavy, findings)
    chosen = [node for node in plan.nodes if node.op_type in HEAVY]
    demoted: list[onnx_ir.Node] = []
    if chosen:
        by_output = {node.outputs[0].name or "": parameters[id(node.inputs[0])] for node in chosen}
        sqnr = sqnr_per_node(model, by_output, config, context)
        keep, demoted = _judge(chosen, sqnr, findings)
        plan = make_plan(model.graph, keep)
        QdqWriter(editor, store).write(plan, parameters)
        guard_float_nodes(model.graph, editor)
        findings.changes.update(node.op_type for node in plan.nodes)
    _explain_light(heavy, plan, findings)
    context.progress(0.9, "quantizing what takes its ranges at run time")
    settled = set(heavy) - set(demoted)
    rest = [node for node in model.nodes() if node not in settled and node.op_type != "Conv"]
    quantize_nodes(rest, config, editor, store, findings)


def quantize_nodes(
    nodes: Iterable[onnx_ir.Node], config: QuantizeConfig, editor: Editor, store: WeightStore, findings: Findings
) -> None:
    """Dynamic quantization of those among `nodes` that can have it."""
    rewriter = dynamic.DynamicRewriter(editor, store)
    for node in list(nodes):
        if not dynamic.is_candidate(node) or is_excluded(node.name, config.exclude):
            continue
        if reason := dynamic.why_not(node):
            findings.skip(node, reason)
            continue
        rewriter.rewrite(node)
        findings.changes[node.op_type] += 1


def _choose(model: Model, config: QuantizeConfig, findings: Findings) -> list[onnx_ir.Node]:
    """The heavy nodes of the main graph that can be quantized; why the others cannot goes into the findings."""
    chosen = []
    for node in model.nodes():
        if node.op_type not in HEAVY or node.domain or is_excluded(node.name, config.exclude):
            continue
        if node.graph is not model.graph:
            if node.op_type == "Conv":
                findings.skip(node, "it lies inside an If, Loop or Scan, where calibration cannot observe its input")
        elif (reason := why_not_static(node)) is None:
            chosen.append(node)
        elif node.op_type == "Conv":
            findings.skip(node, reason)  # a product's turn comes again with the dynamic rewrites
    return chosen


def _calibrate(
    model: Model, config: QuantizeConfig, context: Context, heavy: list[onnx_ir.Node], findings: Findings
) -> tuple[Plan, dict[int, ActivationParameters]]:
    """The plan without nodes that touch values which are not finite, and the parameters of its tensors."""
    plan = make_plan(model.graph, heavy)
    if not plan.tensors:
        return plan, {}
    if not context.data.provided:
        findings.warnings.append(
            "Static quantization was calibrated on synthetic inputs, whose ranges need not be those of real ones: give "
            "representative inputs with --data."
        )
    histograms = observe(model, plan.observed(), context)
    broken = {name for name, histogram in histograms.items() if histogram.non_finite or not histogram.total}
    if broken:
        plan = _without(model, plan, heavy, broken, histograms, findings)
    method = METHODS[config.calibration]
    parameters = {
        key: activation_parameters(method(histograms[tensor.range_of.name or ""]), config.activations)
        for key, tensor in plan.tensors.items()
    }
    return plan, parameters


def _without(
    model: Model,
    plan: Plan,
    heavy: list[onnx_ir.Node],
    broken: set[str],
    histograms: dict[str, Histogram],
    findings: Findings,
) -> Plan:
    sound = []
    for node in heavy:
        touched = [node.inputs[0], *(output for output in node.outputs)]
        bad = [value.name for value in touched if value is not None and value.name in broken]
        if bad:
            seen = histograms[bad[0] or ""]
            what = "infinite or NaN values" if seen.non_finite else "no values at all"
            findings.skip(node, f"tensor {bad[0]!r} held {what} during calibration")
        else:
            sound.append(node)
    return make_plan(model.graph, sound)


def _explain_light(heavy: list[onnx_ir.Node], plan: Plan, findings: Findings) -> None:
    planned = set(plan.nodes)
    for node in heavy:
        if is_light(node) and node not in planned:
            reason = "it sums up few products (depthwise, or few channels) beside float32 nodes: 8 bits would be slower"
            findings.skip(node, reason)


def _judge(
    nodes: list[onnx_ir.Node], sqnr: dict[str, float], findings: Findings
) -> tuple[list[onnx_ir.Node], list[onnx_ir.Node]]:
    """Nodes that are quantized statically, and products that take their ranges at run time."""
    keep, demoted = [], []
    for node in nodes:
        loss = sqnr[node.outputs[0].name or ""]
        if node.op_type == "Conv":
            if loss >= CONV_FLOOR_DB:
                keep.append(node)
            else:
                findings.skip(node, f"8 bits would leave it a signal-to-noise ratio of {loss:.1f} dB only")
        elif loss >= PRODUCT_FLOOR_DB or dynamic.why_not(node):
            keep.append(node)
        else:
            demoted.append(node)
    return keep, demoted
