"""Cross-layer equalization: neighbouring layers get weights of like ranges, channel by channel, without any data.

    W1' = W1 / s,  W2' = W2 diag(s),  s = sqrt(r1 / r2)        r1, r2: largest magnitudes of a channel's weights

so that both have sqrt(r1 r2) (Nagel et al., "Data-Free Quantization Through Weight Equalization and Bias Correction",
arXiv:1906.04721). It holds where what lies between is linear or a Relu, and where W1's channel has no other reader
(edges.py); a chain of layers takes a few rounds. A Relu6 or hard-swish is in the way: the clipping would move.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir

from modelpress_compression.graph.edit import Editor, clean
from modelpress_compression.graph.read import constant_array, required
from modelpress_compression.model import Model
from modelpress_compression.passes.quantize.scaling.edges import Edge, Scale, Slot, find_edges

ROUNDS = 8
# Ends the rounds: no channel moved by more than this share.
_SETTLED = 0.01
# A dead channel has no range to share; no scale goes further than this in one round.
_MOST = 1e3


def equalize(model: Model, layers: Sequence[onnx_ir.Node], editor: Editor) -> int:
    """Equalizes in place; returns between how many pairs of layers."""
    edges = [edge for edge in find_edges(model.graph, layers) if _weights_of(edge)]
    for _ in range(ROUNDS if edges else 0):
        moved = 0.0
        for edge in edges:
            scale = pair_scale(edge)
            moved = max(moved, float(np.abs(np.log(scale)).max()))
            edge.apply(scale, editor)
        clean(model)
        if moved < _SETTLED:
            break
    return len(edges)


def pair_scale(edge: Edge) -> Scale:
    """s [K]: 1 for channels without weights on one of the sides."""
    before = np.max([_ranges(slot) for slot in _weights_of(edge)], axis=0)
    behind = np.max([_ranges(slot) for slot in edge.weights], axis=0)
    alive = (before > 0) & (behind > 0)
    scale = np.sqrt(np.where(alive, before, 1) / np.where(alive, behind, 1))
    return np.asarray(np.clip(scale, 1 / _MOST, _MOST), np.float64)


def _weights_of(edge: Edge) -> list[Slot]:
    """The weights, not biases, among what makes the edge's activation."""
    return [slot for slot in edge.makers if slot.index == 1 and slot.node.op_type in ("Conv", "MatMul", "Gemm")]


def _ranges(slot: Slot) -> Scale:
    weight = np.abs(np.asarray(constant_array(required(slot.node, slot.index)), np.float64))
    return np.asarray(np.moveaxis(weight, slot.axis, 0).reshape(weight.shape[slot.axis], -1).max(axis=1), np.float64)
