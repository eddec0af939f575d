"""Static quantization: convolutions and matrix products in integers from one to the next, ranges from calibration.

preparation.py does once what any choice of nodes needs. The quantizer that it makes then writes a model for a choice:
the plan for the nodes that shall be in 8 bits (plan.py) as pairs of QuantizeLinear and DequantizeLinear (qdq.py). What
has no static kernel (LSTM, Attention, embeddings, products inside subgraphs), or is better off with ranges of its own
in each run, is quantized dynamically (../dynamic.py).
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import onnx_ir

from modelpress_compression.encodings.products import fuse_products
from modelpress_compression.graph.edit import Editor, clean
from modelpress_compression.graph.read import required
from modelpress_compression.model import Model
from modelpress_compression.passes.base import PassResult
from modelpress_compression.passes.integers.certificate import certified
from modelpress_compression.passes.quantize import dynamic
from modelpress_compression.passes.quantize.config import QuantizeConfig
from modelpress_compression.passes.quantize.plan import Plan, is_light, make_plan
from modelpress_compression.passes.quantize.ranges.choice import Ranges
from modelpress_compression.passes.quantize.report import Findings
from modelpress_compression.passes.quantize.rounding.rounder import Rounder
from modelpress_compression.passes.quantize.static.bias_correction import Shifts, correct
from modelpress_compression.passes.quantize.static.qdq import QdqWriter, guard_float_nodes
from modelpress_compression.passes.quantize.weights import WeightStore
from modelpress_compression.target import Target

# Names in the changes, besides those of operators.
SMOOTHED, EQUALIZED, CORRECTED, GPTQ = "smooth_quant", "equalize", "bias_correction", "gptq"


@dataclass
class StaticQuantizer:
    """A model that is ready for static quantization, as preparation.py made it; it is not changed any more.

    `heavy`: names of the outputs of the nodes that can be in 8 bits; `ranges`: of the tensors between them.
    """

    model: Model
    config: QuantizeConfig
    heavy: frozenset[str]
    ranges: Ranges
    findings: Findings
    rounder: Rounder
    target: Target
    floats: frozenset[str] = field(default=frozenset())  # of `heavy`, what must stay float32
    shifts: Shifts = field(default_factory=dict)  # of means, which biases take back
    wide: bool = False  # see make_plan

    def result(self, floats: frozenset[str] = frozenset()) -> PassResult:
        """What the pass gives with the nodes of these outputs in float32."""
        written = Findings()
        work = self.quantize(floats, written)
        result = self.findings.plus(written).result(work)
        # Where nothing came of it in 8 bits, new scales are not worth a change.
        return certified(result, self.target) if written.changes else replace(result, changes={})

    @property
    def plan(self) -> Plan:
        """The plan with every node that can be in 8 bits."""
        return self._plan(self.model, frozenset())

    @property
    def widest(self) -> Plan:
        """The plan with light nodes too."""
        return replace(self, wide=True).plan

    def quantize(self, floats: frozenset[str], findings: Findings) -> Model:
        """A model in which the nodes with these outputs, and those that must, stay float32."""
        work = self.model.clone()
        editor = Editor(work)
        store = WeightStore(editor, self.config, self.rounder, self.target)
        plan = self._plan(work, floats)
        self._explain_light(plan, floats, findings)
        planned = plan.members
        if count := correct(plan, self.shifts, editor):
            findings.changes[CORRECTED] = count
        QdqWriter(editor, store).write(plan, self.ranges.on(plan))
        guard_float_nodes(work.graph, editor)
        findings.changes.update(node.op_type for node in plan.nodes)
        left = self.floats | floats
        rest = [
            node
            for node in work.nodes()
            if node not in planned
            and node.op_type != "Conv"
            and node.outputs
            and node.outputs[0].name not in left
            and not is_light(node)
        ]
        dynamic.quantize_nodes(rest, self.config, editor, store, findings)
        fuse_products(work, editor)
        clean(work)
        return work

    def _plan(self, model: Model, floats: frozenset[str]) -> Plan:
        left = self.floats | floats
        chosen = [
            node
            for node in model.graph
            if node.outputs and node.outputs[0].name in self.heavy - left and not self._is_dynamic(node)
        ]
        return make_plan(model.graph, chosen, wide=self.wide)

    def _explain_light(self, plan: Plan, floats: frozenset[str], findings: Findings) -> None:
        planned, left = {node.outputs[0].name for node in plan.nodes}, self.floats | floats
        for node in plan.graph:
            if node.outputs and node.outputs[0].name in self.heavy - planned - left and is_light(node):
                few = (
                    "sums up few products (depthwise, or few channels)" if node.op_type == "Conv" else "has few weights"
                )
                findings.skip(node, f"it {few} beside float32 nodes: 8 bits would be slower")

    def _is_dynamic(self, node: onnx_ir.Node) -> bool:
        return node.op_type != "Conv" and required(node, 0).name in self.ranges.dynamic and not dynamic.why_not(node)
