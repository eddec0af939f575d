"""What a result of `breadth` is held against: how near its answers are, and how near any could be.

A detector returns the few best of many boxes. Of an untrained one the scores are nearly equal (the five best of
RetinaNet: .837, .832, .829, .829, .823), and the least disturbance makes others the best: noise of a thousandth in the
image leaves a cosine of .82 of the float model's own boxes, and of Mask R-CNN's .62. So where outputs are a selection,
a result is held against the float model with its weights disturbed as much as rounding disturbs them, at random: who is
as near as those has rounded as well as so few bits can.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from modelpress_compression.runtime import open_session, run
from onnx import numpy_helper

_SELECTING = frozenset(("TopK", "NonMaxSuppression"))
# Of a recipe, in deviations of a weight. 4 bits: 15 steps over blocks of 32 numbers, whose largest is 2.07 deviations,
# so that a step is 2 * 2.07 / 14, and its error step / sqrt(12). 8 bits: 255 steps over 6 deviations, of weights and of
# what they are multiplied with.
ROUNDING = {"int4": 0.085, "static": 0.01}
_DISTURBED, _LEAST_WEIGHTS = 9, 256


def cosine(before: Mapping[str, Any], after: Mapping[str, Any]) -> float:
    """The least of all float outputs; outputs of other types or shapes do not count."""
    least = 1.0
    for name, array in before.items():
        if array.dtype.kind == "f" and array.size and array.shape == after[name].shape:
            a, b = array.astype(np.float64).ravel(), after[name].astype(np.float64).ravel()
            norm = float(np.linalg.norm(a) * np.linalg.norm(b))
            least = min(least, float(a @ b) / norm if norm else float(np.array_equal(a, b)))
    return least


def disturbed(path: Path, feed: Mapping[str, Any], before: Mapping[str, Any], error: float) -> float:
    """The least cosine of the model's answers `before` with those of some models whose weights are disturbed by `error`
    of their deviation; 1.0 where no output is a selection."""
    if not any(node.op_type in _SELECTING for node in _nodes(onnx.load(path).graph)):
        return 1.0
    return min(cosine(before, _answers_of_disturbed(path, feed, error, seed)) for seed in range(_DISTURBED))


def _nodes(graph: onnx.GraphProto) -> list[onnx.NodeProto]:
    inner = [attribute.g for node in graph.node for attribute in node.attribute if attribute.HasField("g")]
    return [*graph.node, *(node for one in inner for node in _nodes(one))]


def _answers_of_disturbed(path: Path, feed: Mapping[str, Any], error: float, seed: int) -> Mapping[str, Any]:
    rng = np.random.default_rng(seed)
    proto = onnx.load(path)
    for tensor in proto.graph.initializer:
        weights = numpy_helper.to_array(tensor)
        if weights.dtype == np.float32 and weights.ndim >= 2 and weights.size >= _LEAST_WEIGHTS:
            noise = error * weights.std() * rng.standard_normal(weights.shape)
            tensor.CopyFrom(numpy_helper.from_array((weights + noise).astype(np.float32), tensor.name))
    with tempfile.TemporaryDirectory(prefix="modelpress-") as folder:
        onnx.save(proto, Path(folder) / "disturbed.onnx")
        return run(open_session(Path(folder) / "disturbed.onnx"), feed)


def other_extents(model: Any, before: Mapping[str, Any], after: Mapping[str, Any], *, of_data: bool) -> list[str]:
    """Outputs whose shape is another one. `of_data`: extents that only the data decide count too, such as how many
    boxes were found; where answers may move, as of a network that speaks, so may how long they are."""
    told = {dim for spec in model.inputs for dim in spec.shape}
    found = []
    for spec in model.outputs:
        given, back = before[spec.name].shape, after[spec.name].shape
        fixed = [of_data or isinstance(dim, int) or dim in told for dim in spec.shape]
        if len(given) != len(back) or any(
            one != other for one, other, counts in zip(given, back, fixed, strict=True) if counts
        ):
            found.append(spec.name)
    return found
