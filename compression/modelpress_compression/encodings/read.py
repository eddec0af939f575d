"""The quantized weights of a node, whatever their format."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

import onnx_ir

from modelpress_compression.encodings import folded, n_bits, products, qdq
from modelpress_compression.encodings.weight import StoredWeight

_READERS: Mapping[str, Callable[[onnx_ir.Node], tuple[StoredWeight, ...]]] = MappingProxyType(
    {
        "MatMulNBits": n_bits.read_product,
        "GatherBlockQuantized": n_bits.read_table,
        "MatMulInteger": products.read,
        "ConvInteger": products.read,
        "Mul": folded.read_levels,
        "Gather": folded.read_rows,
        "Reshape": folded.read_4_bits,
    }
)


def stored_weights(node: onnx_ir.Node) -> tuple[StoredWeight, ...]:
    """Constant weights that the node multiplies by, looks up, or makes floats of; mostly one, of an LSTM two.

    Nothing where the weight, a scale or a zero point is computed, or of a shape that does not go with the weight's.
    """
    return tuple(stored for stored in _READERS.get(node.op_type, qdq.read)(node) if stored.weight.is_consistent)
