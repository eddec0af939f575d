"""How near the answers of a result of `breadth` are to the loaded model's.

A detector returns the few best of many boxes. Of an untrained one the scores are nearly equal (the five best of
RetinaNet: .837, .832, .829, .829, .823), and the least disturbance makes others the best. So where outputs are a
selection, both models select what the loaded one selects, and the scores of all candidates are compared beside them.
Where the largest element of an untrained heat map is (a keypoint), rounding decides all the same: such a result is
held against the loaded model with its weights disturbed as much as rounding disturbs them, at random. Who is as near as
those has rounded as well as so few bits can.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from modelpress_compression.graph.selections import asked_alike, selections_of
from modelpress_compression.loaders import load
from modelpress_compression.runtime import run, session_of
from onnx import numpy_helper

# Of a recipe, in deviations of a weight. 4 bits: 15 steps over blocks of 32 numbers, whose largest is 2.07 deviations,
# so that a step is 2 * 2.07 / 14, and its error step / sqrt(12). 8 bits: 255 steps over 6 deviations, of weights and of
# what they are multiplied with.
ROUNDING = {"int4": 0.085, "static": 0.01}
_DISTURBED, _LEAST_WEIGHTS = 9, 256


def answers(loaded: Path, result: Path, feed: Mapping[str, Any]) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
    """Of the models in both files, as far as they are compared."""
    first, second = load(loaded), load(result)
    alike = asked_alike(first, second, selections_of(first, [feed]))
    with session_of(alike.first) as one, session_of(alike.second) as other:
        before = run(one, feed)
        return alike.compared(before, run(other, {**feed, **alike.given(before)}))


def cosine(before: Mapping[str, Any], after: Mapping[str, Any]) -> float:
    """The least of all float outputs; outputs of other types or shapes do not count."""
    least = 1.0
    for name, array in before.items():
        if array.dtype.kind == "f" and array.size and array.shape == after[name].shape:
            a, b = array.astype(np.float64).ravel(), after[name].astype(np.float64).ravel()
            norm = float(np.linalg.norm(a) * np.linalg.norm(b))
            least = min(least, float(a @ b) / norm if norm else float(np.array_equal(a, b)))
    return least


def disturbed(loaded: Path, feed: Mapping[str, Any], error: float) -> float:
    """The least cosine of the loaded model's answers with those of some models whose weights are disturbed by `error`
    of their deviation; 1.0 where no output is a selection."""
    if selections_of(load(loaded), [feed]) is None:
        return 1.0
    with tempfile.TemporaryDirectory(prefix="modelpress-") as folder:
        path = Path(folder) / "disturbed.onnx"
        return min(_least(loaded, path, feed, error, seed) for seed in range(_DISTURBED))


def _least(loaded: Path, path: Path, feed: Mapping[str, Any], error: float, seed: int) -> float:
    rng = np.random.default_rng(seed)
    proto = onnx.load(loaded)
    for tensor in proto.graph.initializer:
        weights = numpy_helper.to_array(tensor)
        if weights.dtype == np.float32 and weights.ndim > 1 and weights.size >= _LEAST_WEIGHTS:
            noise = error * weights.std() * rng.standard_normal(weights.shape)
            tensor.CopyFrom(numpy_helper.from_array((weights + noise).astype(np.float32), tensor.name))
    onnx.save(proto, path)
    return cosine(*answers(loaded, path, feed))


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
