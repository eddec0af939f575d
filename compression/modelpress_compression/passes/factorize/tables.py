"""Embedding tables: rows of W [V, D] that are looked up become rows of A [V, r], and one product with B [r, D].

    y = W[i],    W ~ A B:  r (V + D) numbers in the place of V D

The factorized embedding of ALBERT (Lan et al., arXiv:1909.11942), of a table that is trained already. It is the `svd`
of a product whose inputs are one-hot: their second moments are diagonal, and say how often each row is read,

    h_i = 1 + min(1, V / N) n_i,    n_i reads of row i in the data, N in all.

Every row counts for one read, whatever the data shows, and what was read at most for as much again as the whole table:
of the table without regard to reads no more than about twice the share is lost that is lost of what is read.

A lookup multiplies nothing and its factors do, so that a table costs fewer numbers, never less time. Tables of trained
models may be of nearly full rank: half of the numbers of a sentence encoder's lose 22 % of the energy. On other
sentences than those whose reads were counted, reads keep 3 to 6 dB more of its answers at the same rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import onnx_ir

from modelpress_compression.graph.linear import Matrix
from modelpress_compression.graph.padding import counted_among, counted_positions, is_attention_mask
from modelpress_compression.graph.read import constant_tensor, input_of, int_attribute, is_constant, is_op
from modelpress_compression.graph.watch import observable, stream
from modelpress_compression.inputs import Array
from modelpress_compression.model import Model
from modelpress_compression.passes.base import Context

# Samples whose reads are counted.
MAX_SAMPLES: Final = 1024
MIN_NUMBERS: Final = 1024  # of a table
# Numbers of the largest table whose factors are looked for: 1 GiB of float64, of which there are two copies.
MAX_NUMBERS: Final = 2**27
_FLOATS: Final = (onnx_ir.DataType.FLOAT, onnx_ir.DataType.FLOAT16, onnx_ir.DataType.DOUBLE)


@dataclass(frozen=True)
class Lookup:
    """Gather of the rows of a table: a product of one-hot rows with it."""

    def matrix(self, table: Array) -> Matrix:
        """The table as [1, V, D]."""
        matrix: Matrix = table.astype(np.float64)[None]
        return matrix


def is_lookup(node: onnx_ir.Node) -> bool:
    """Whether the node looks up rows of a matrix of floats, which is its first input."""
    table = input_of(node, 0) if is_op(node, "Gather") else None
    if table is None or table.dtype not in _FLOATS:
        return False
    return table.shape is not None and len(table.shape) == 2 and not int_attribute(node, "axis", 0) % 2


def lookup_of(node: onnx_ir.Node) -> Lookup | str:
    """How the node looks up rows, or why its table is left alone."""
    tensor = constant_tensor(input_of(node, 0))
    if tensor is None:
        return "its table is not constant"
    if is_constant(input_of(node, 1)):
        return "its indices are constant, and fuse folds it"
    return Lookup() if tensor.size <= MAX_NUMBERS else f"its table has over {MAX_NUMBERS} numbers"


def reads(model: Model, nodes: Sequence[onnx_ir.Node], rows: int, context: Context) -> Matrix | None:
    """h [rows] of the table that the nodes read; None where their indices cannot be looked at.

    Positions that an attention mask leaves out are not counted. Raises ModelNotRunnableError, TimeLimitError.
    """
    indices = {value.name or "" for node in nodes if observable(value := node.inputs[1], model) and value is not None}
    if not indices:
        return None
    masks = {spec.name for spec in model.inputs if is_attention_mask(spec.name)}
    counts = np.zeros(rows)
    samples = context.data.spread(MAX_SAMPLES)
    for found in stream(model, sorted(indices | masks), samples, context.check_time):
        mask = counted_positions({name: found[name] for name in masks})
        for name in indices:
            counted = counted_among(found[name].shape, mask)
            read = found[name] if counted is None else found[name][counted]
            counts += np.bincount(np.reshape(read, -1) % rows, minlength=rows)  # negative indices count from the end
    weights: Matrix = 1 + min(1.0, rows / max(1.0, counts.sum())) * counts
    return weights
