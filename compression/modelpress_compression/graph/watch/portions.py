"""Values that are looked at together: as many as one sample fills a bounded memory with.

What onnxruntime is asked for it keeps until the end of a run, and so do we: of a picture of 1000 x 1000 the activations
of a usual network together take gigabytes, and those of two or three layers at a time some hundred megabytes. Whoever
needs each value by itself goes over the data once for each portion; most models make one portion.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping, Sequence

import onnx_ir

from modelpress_compression.graph.shapes import Shape, sample_shapes, shape_of, static_shapes
from modelpress_compression.inputs import InputData
from modelpress_compression.model import Model

WATCHED_BYTES = 512 * 1024**2  # 512 MiB: of one sample, in each run
# Of the bytes of all values of a sample: activations, what is added to them, and their gradients.
GRADIENT_COPIES = 2.5
MAX_GRADIENT_BYTES = 4 * 1024**3  # 4 GiB: of all samples whose gradients are held at a time
_FLOAT_BYTES = 4


def portions(model: Model, groups: Sequence[Sequence[str]], samples: InputData) -> Iterator[list[int]]:
    """Numbers of the `groups`, in their order, that are looked at together; each group names values that have to be.

    A group that takes more by itself is a portion of its own.
    """
    sizes = sample_bytes(model, {name for group in groups for name in group}, samples)
    portion: list[int] = []
    names: set[str] = set()
    for number, group in enumerate(groups):
        together = names.union(group)
        if portion and sum(sizes[name] for name in together) > WATCHED_BYTES:
            yield portion
            portion, together = [], set(group)
        portion.append(number)
        names = together
    if portion:
        yield portion


def sample_bytes(model: Model, names: Collection[str], samples: InputData) -> dict[str, int]:
    """What one sample (or a fixed batch) makes of each of these values of the main graph; 0 where that is not known."""
    shapes = sample_shapes(samples)
    values = {value.name or "": value for value in _values(model.ir)}
    extents = _extents(model, shapes)
    found = {name: _bytes_of(values.get(name), extents) for name in names}
    if any(size is None for size in found.values()):
        known = {value.name or "": value for value in _values(static_shapes(model, shapes))}
        found = {name: value_bytes(known[name]) if name in known else 0 for name in names}
    return {name: size or 0 for name, size in found.items()}


def activations_bytes(model: Model, samples: InputData) -> int:
    """Bytes of all values that the nodes make of one sample (or a fixed batch), as far as their shapes are known."""
    return sum(made_bytes(model, samples))


def made_bytes(model: Model, samples: InputData) -> list[int]:
    """The same of each value by itself."""
    ir = static_shapes(model, sample_shapes(samples))
    return [value_bytes(value) for node in ir.graph.all_nodes() for value in node.outputs]


def gradient_bytes(model: Model, samples: InputData) -> float:
    """What is held while the gradients of one sample (or a fixed batch) are computed."""
    return GRADIENT_COPIES * activations_bytes(model, samples)


def value_bytes(value: onnx_ir.Value) -> int:
    """Of a value, 0 where its shape is not known."""
    shape = shape_of(value)
    return 0 if shape is None else _bytes(value, shape)


def _bytes(value: onnx_ir.Value, shape: Sequence[int]) -> int:
    if value.dtype is None or value.dtype.is_string():  # words have no size that the graph knows
        return math.prod(shape) * _FLOAT_BYTES
    return math.ceil(math.prod(shape) * value.dtype.itemsize)  # types of less than a byte have a part of one


def _values(ir: onnx_ir.Model) -> Iterator[onnx_ir.Value]:
    yield from ir.graph.inputs
    for node in ir.graph:
        yield from node.outputs


def _extents(model: Model, shapes: Mapping[str, Shape]) -> dict[str, int]:
    """Of the dynamic dimensions of the inputs, by their names."""
    found: dict[str, int] = {}
    for value in model.graph.inputs:
        for dim, extent in zip(value.shape or (), shapes.get(value.name or "", ()), strict=False):
            if isinstance(dim, onnx_ir.SymbolicDim) and dim.value is not None:
                found[dim.value] = extent
    return found


def _bytes_of(value: onnx_ir.Value | None, extents: Mapping[str, int]) -> int | None:
    """By the shape that the graph has for the value; None: it has none, or one that does not follow from the inputs."""
    if value is None or value.shape is None:
        return None
    shape = [dim if isinstance(dim, int) else extents.get(dim.value or "") for dim in value.shape]
    known = [extent for extent in shape if extent is not None]
    return _bytes(value, known) if len(known) == len(shape) else None
