"""Static quantization: convolutions and matrix products in integers from one to the next, ranges from calibration.

preparation.py does once what any choice of layers needs. The quantizer that it makes then writes a model for a choice:
the plan for the layers that shall be in 8 bits (plan.py) as pairs of QuantizeLinear and DequantizeLinear (qdq.py). What
has no static kernel (LSTM, Attention, embeddings, products inside subgraphs), or is better off with ranges of its own
in each run, is quantized dynamically (../dynamic.py).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace

import onnx_ir

from modelpress_compression.encodings.products import fuse_products
from modelpress_compression.graph.edit import Editor, clean
from modelpress_compression.graph.read import required
from modelpress_compression.model import Model
from modelpress_compression.passes.base import PassResult
from modelpress_compression.passes.integers.certificate import certified
from modelpress_compression.passes.quantize import dynamic
from modelpress_compression.passes.quantize.plan import Plan, is_memory_bound, make_plan
from modelpress_compression.passes.quantize.ranges.choice import Ranges
from modelpress_compression.passes.quantize.report import Findings
from modelpress_compression.passes.quantize.setup import QuantizationSetup
from modelpress_compression.passes.quantize.static.bias_correction import Shifts, correct
from modelpress_compression.passes.quantize.static.forms import guard_float_nodes, keep_sums_apart
from modelpress_compression.passes.quantize.static.qdq import QdqWriter
from modelpress_compression.passes.quantize.views import restore_views, root_of
from modelpress_compression.target import DEVICES

# A name in the changes, besides those of operators.
CORRECTED = "bias_correction"


@dataclass(frozen=True)
class StaticQuantizer:
    """A model that is ready for static quantization, as preparation.py made it.

    `setup`: with the full plan of all layers that have an 8-bit form; `ranges`: of its activations; `findings`: of the
    preparation. `kept_in_float`: names of the outputs of layers that stay in float32. `shifts`: of means, which biases
    take back. `full`: whether to write a full plan (see make_plan).
    """

    setup: QuantizationSetup
    ranges: Ranges
    findings: Findings
    kept_in_float: frozenset[str] = frozenset()
    shifts: Shifts = field(default_factory=dict)
    full: bool = False

    def keeping_in_float(self, names: Iterable[str]) -> StaticQuantizer:
        """The same with the layers of these outputs in float32 too, and those that share a weight with them: it is
        written once."""
        named = frozenset(names)
        shared = {id(self._root(layer)) for layer in self.setup.plan.layers if layer.outputs[0].name in named}
        alike = {layer.outputs[0].name or "" for layer in self.setup.plan.layers if id(self._root(layer)) in shared}
        return replace(self, kept_in_float=self.kept_in_float | named | alike)

    @staticmethod
    def _root(layer: onnx_ir.Node) -> onnx_ir.TensorProtocol | None:
        return root_of(required(layer, 1))[0]

    def result(self) -> PassResult:
        """What the pass gives."""
        work, written = self.quantize()
        result = self.findings.plus(written).result(work)
        # Where nothing came of it in 8 bits, new scales are not worth a change.
        return certified(result, self.setup.context.target) if written.changes else replace(result, changes={})

    @property
    def plan(self) -> Plan:
        """The plan for `setup.model` with every layer that shall be in 8 bits, and finds no range in each run."""
        chosen = [
            node
            for node in self.setup.plan.layers
            if node.outputs[0].name not in self.kept_in_float and not self._is_dynamic(node)
        ]
        return make_plan(self.setup.model.graph, chosen, full=self.full)

    def quantize(self) -> tuple[Model, Findings]:
        """The quantized model, and what was done to it."""
        findings, work = Findings(), self.setup.model.clone()
        editor = Editor(work)
        store = self.setup.weight_store(editor)
        plan = self.plan.on(work.graph)
        self._explain_memory_bound(plan, findings)
        rest = self._rest(work, plan)
        if count := correct(plan, self.shifts, editor):
            findings.changes[CORRECTED] = count
        device, parameters = DEVICES[self.setup.context.target.device], self.ranges.on(plan)
        if device.symmetric:
            parameters = {name: one.symmetric for name, one in parameters.items()}
        QdqWriter(editor, store, device.symmetric).write(plan, parameters)
        guard_float_nodes(work.graph, editor)
        findings.changes.update(node.op_type for node in plan.nodes)
        if device.finds_ranges:
            dynamic.quantize_nodes(rest, self.setup.config, editor, store, findings)
        store.finish()
        if not device.pairs:
            fuse_products(work, editor)
        keep_sums_apart(work.graph)
        clean(work)
        restore_views(work)
        return work, findings

    def _rest(self, work: Model, plan: Plan) -> list[onnx_ir.Node]:
        """Nodes beside the plan that may be quantized dynamically."""
        return [
            node
            for node in work.nodes()
            if node not in plan.members
            and node.op_type != "Conv"
            and node.outputs
            and node.outputs[0].name not in self.kept_in_float
            and not is_memory_bound(node)
        ]

    def _explain_memory_bound(self, plan: Plan, findings: Findings) -> None:
        """Says of the layers that the plan leaves out because nothing beside them is in 8 bits."""
        planned = {node.outputs[0].name for node in plan.layers}
        for layer in self.setup.plan.layers:
            name = layer.outputs[0].name
            if name not in planned and name not in self.kept_in_float and is_memory_bound(layer):
                is_conv = layer.op_type == "Conv"
                few = "sums up few products (depthwise, or few channels)" if is_conv else "has few weights"
                findings.skip(layer, f"it {few} beside float32 nodes: 8 bits would be slower")

    def _is_dynamic(self, node: onnx_ir.Node) -> bool:
        return node.op_type != "Conv" and required(node, 0).name in self.ranges.dynamic and not dynamic.why_not(node)
