"""A quantized model as a CPU without VNNI computes it: with explicit arithmetic that any CPU runs exactly.

    y = scale * (sum_k (x_k - zero_point) w_k + bias - E),    E = sum over pairs of (s - clip(s, -32768, 32767)),
    s = x_2i w_2i + x_2i+1 w_2i+1

Integers are held in float32, which is exact below 2^24. E needs only those pairs whose weights can leave 16 bits:
they are kernels of their own with two weights each, summed up by a second convolution or product. Without saturation
(E = 0) the result is what VNNI computes, up to rounding where a requantized value lies in the middle of two levels.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir
from modelpress_compression.encodings.products import split_products
from modelpress_compression.graph.edit import Editor, clean
from modelpress_compression.graph.read import attribute, constant_array, graph_of, input_of, label
from modelpress_compression.model import Model
from numpy.typing import NDArray

LOW, HIGH = -32768, 32767
BLOCK = 64  # outputs


def emulate(model: Model, *, saturating: bool) -> Model:
    """The model with every 8-bit Conv, MatMul, Gemm and MatMulInteger written out. Raises NotImplementedError."""
    work = model.clone()
    editor = Editor(work)
    split_products(work, editor)
    for node in list(work.nodes()):
        if node.op_type in ("DynamicQuantizeLSTM", "QAttention"):
            raise NotImplementedError(f"{label(node)}: {node.op_type} is not emulated.")
        if node.op_type == "MatMulInteger":
            _Product(editor, node, saturating).integers()
        elif node.op_type in ("Conv", "MatMul", "Gemm") and all(
            value is not None and _source(value) is not None for value in node.inputs[:2]
        ):
            _Product(editor, node, saturating).dequantized()
    clean(work)
    return work


def pairs_beyond(rows: NDArray[np.int8]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """[outputs, terms] -> output and first term of every pair that some bytes 0 to 255 drive out of 16 bits."""
    wide = np.pad(rows, ((0, 0), (0, rows.shape[1] % 2))).astype(np.int64).reshape(len(rows), -1, 2)
    most, least = np.maximum(wide, 0).sum(axis=2) * 255, np.minimum(wide, 0).sum(axis=2) * 255
    outputs, pairs = np.nonzero((most > HIGH) | (least < LOW))
    return outputs, pairs * 2


def _source(value: onnx_ir.Value) -> onnx_ir.Node | None:
    producer = value.producer()
    return producer if producer is not None and producer.op_type == "DequantizeLinear" else None


class _Product:
    def __init__(self, editor: Editor, node: onnx_ir.Node, saturating: bool) -> None:
        self.editor, self.node, self.saturating = editor, node, saturating

    def dequantized(self) -> None:
        node = self.node
        x, w = (_source(value) for value in node.inputs[:2])  # type: ignore[arg-type]  # the caller has looked
        levels = np.asarray(constant_array(w.inputs[0]))
        x_scale, w_scale = (np.asarray(constant_array(item.inputs[1])) for item in (x, w))
        result = self._sum(x.inputs[0], x.inputs[2], levels, self._zero_point(w.inputs[2], levels))
        scale = (x_scale * w_scale).astype(np.float32)
        bias = input_of(node, 2)
        shape = (1, -1, *[1] * (levels.ndim - 2)) if node.op_type == "Conv" else (-1,)
        if bias is not None:
            integer = _source(bias)
            whole = np.asarray(constant_array(integer.inputs[0]), np.float32)
            result = self._emit("Add", result, self._constant(whole.reshape(shape)))
        result = self._emit("Mul", result, self._constant(scale.reshape(shape) if scale.ndim else scale))
        self._replace(result)

    def integers(self) -> None:
        node = self.node
        levels = np.asarray(constant_array(node.inputs[1]))
        result = self._sum(node.inputs[0], input_of(node, 2), levels, self._zero_point(input_of(node, 3), levels))
        self._replace(self._emit("Cast", result, to=int(onnx_ir.DataType.INT32)))

    def _sum(
        self, x: onnx_ir.Value, zero_point: onnx_ir.Value | None, levels: NDArray[Any], middle: int
    ) -> onnx_ir.Value:
        """sum_k (x_k - zero_point) w_k - E, whole numbers in float32."""
        byte = self._emit("Cast", x, to=int(onnx_ir.DataType.FLOAT))
        centred = byte
        if zero_point is not None:
            centred = self._emit("Sub", byte, self._emit("Cast", zero_point, to=int(onnx_ir.DataType.FLOAT)))
        weight = levels.astype(np.float32) - middle
        total = self._product(centred, weight)
        if not self.saturating or levels.dtype != np.int8 or self._is_depthwise(levels):
            return total
        return self._emit("Sub", total, excess) if (excess := self._excess(centred, zero_point, levels)) else total

    def _excess(
        self, centred: onnx_ir.Value, zero_point: onnx_ir.Value | None, levels: NDArray[np.int8]
    ) -> onnx_ir.Value | None:
        """E; None where no pair can saturate."""
        rows = self._rows(levels)
        # The odd rest is alone and cannot saturate, so that `first + 1` below is always a term.
        outputs, first = pairs_beyond(rows)
        if not len(outputs):
            return None
        weights = np.stack([rows[outputs, first], rows[outputs, first + 1]]).astype(np.float32)
        shape = (1, -1, *[1] * (levels.ndim - 2)) if self.node.op_type == "Conv" else (-1,)
        sums = self._pair_sums(centred, levels, first, weights)
        # x itself, not x - zero_point, meets the limits; padding holds the zero point.
        shift = self._constant(weights.sum(axis=0).reshape(shape))
        sums = self._emit("Add", sums, self._emit("Mul", shift, self._stored_zero_point(zero_point)))
        limits = [self._constant(np.asarray(limit, np.float32)) for limit in (LOW, HIGH)]
        beyond = self._emit("Sub", sums, self._emit("Clip", sums, *limits))
        return self._by_output(beyond, np.bincount(outputs, minlength=len(rows)), levels.ndim - 2)

    def _pair_sums(
        self, centred: onnx_ir.Value, levels: NDArray[np.int8], first: NDArray[np.int64], weights: NDArray[np.float32]
    ) -> onnx_ir.Value:
        """One output for each pair."""
        if self.node.op_type != "Conv":
            terms = [self._emit("Gather", centred, self._constant(first + offset), axis=-1) for offset in (0, 1)]
            products = [self._emit("Mul", term, self._constant(weights[offset])) for offset, term in enumerate(terms)]
            return self._emit("Add", *products)
        if attribute(self.node, "group", 1) != 1:
            raise NotImplementedError(f"{label(self.node)}: grouped convolutions are not emulated.")
        kernels = np.zeros((len(first), levels[0].size), np.float32)
        for offset in (0, 1):
            kernels[np.arange(len(first)), first + offset] = weights[offset]
        last = kernels.reshape(len(first), *levels.shape[2:], levels.shape[1])
        return self._product(centred, np.moveaxis(last, -1, 1))

    def _by_output(self, beyond: onnx_ir.Value, counts: NDArray[np.int64], spatial: int) -> onnx_ir.Value:
        """The sum over each output's pairs, which lie side by side; in blocks, whose products are small."""
        axis = 1 if self.node.op_type == "Conv" else -1
        blocks = [block for block in np.array_split(counts, -(-len(counts) // BLOCK)) if block.sum()]
        if sum(map(len, blocks)) < len(counts):  # a block without any pair: take them all at once
            blocks = [counts]
        sizes = self._constant(np.asarray([block.sum() for block in blocks], np.int64))
        parts = self.editor.emit(
            self.node,
            "Split",
            [beyond, sizes],
            label(self.node),
            attributes={"axis": axis},
            outputs=[f"_{index}" for index in range(len(blocks))],
        )
        sums = []
        for part, block in zip(parts, blocks, strict=True):
            members = np.repeat(np.eye(len(block), dtype=np.float32), block, axis=0)
            if self.node.op_type == "Conv":
                kernel = members.T.reshape(len(block), -1, *[1] * spatial)
                sums.append(self._emit("Conv", part, self._constant(kernel)))
            else:
                sums.append(self._emit("MatMul", part, self._constant(members)))
        return self._emit("Concat", *sums, axis=axis)

    def _stored_zero_point(self, zero_point: onnx_ir.Value | None) -> onnx_ir.Value:
        """As the kernel sees it: onnxruntime shifts signed activations to unsigned ones."""
        if zero_point is None:
            return self._constant(np.asarray(0, np.float32))
        real = self._emit("Cast", zero_point, to=int(onnx_ir.DataType.FLOAT))
        signed = zero_point.dtype == onnx_ir.DataType.INT8
        return self._emit("Add", real, self._constant(np.asarray(128 if signed else 0, np.float32)))

    def _product(self, x: onnx_ir.Value, weight: NDArray[np.float32]) -> onnx_ir.Value:
        """The node's own sum of products with other weights."""
        if self.node.op_type != "Conv":
            transposed = self.node.op_type == "Gemm" and attribute(self.node, "transB", 0)
            return self._emit("MatMul", x, self._constant(weight.T if transposed else weight))
        made = self.editor.make("Conv", [x, self._constant(weight)], label(self.node))
        made.attributes.update(self.node.attributes)
        graph_of(self.node).insert_before(self.node, made)
        return made.outputs[0]

    def _rows(self, levels: NDArray[Any]) -> NDArray[Any]:
        """[outputs, terms in the order of the kernel]: channels fastest, then positions."""
        if self.node.op_type == "Conv":
            return np.moveaxis(levels, 1, -1).reshape(len(levels), -1)
        return levels if self.node.op_type == "Gemm" and attribute(self.node, "transB", 0) else levels.T

    def _is_depthwise(self, levels: NDArray[Any]) -> bool:
        group = attribute(self.node, "group", 1) if self.node.op_type == "Conv" else 0
        return bool(group == levels.shape[0] and levels.shape[1] == 1)

    @staticmethod
    def _zero_point(value: onnx_ir.Value | None, levels: NDArray[Any]) -> int:
        zero_point = constant_array(value)
        return 0 if zero_point is None or levels.dtype == np.int8 else int(np.ravel(zero_point)[0])

    def _constant(self, array: NDArray[Any]) -> onnx_ir.Value:
        return self.editor.constant(graph_of(self.node), array, f"{label(self.node)}_emulated")

    def _emit(self, op_type: str, *inputs: onnx_ir.Value, **attributes: int) -> onnx_ir.Value:
        return self.editor.emit(self.node, op_type, inputs, label(self.node), attributes=attributes)[0]

    def _replace(self, result: onnx_ir.Value) -> None:
        self.editor.hand_over(self.node.outputs[0], result)
        graph_of(self.node).remove(self.node, safe=True)
