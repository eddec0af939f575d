"""A look at the data before the long work: what is odd about it, by its numbers and by the model's answers to them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from modelpress_compression.graph.synthetic import made_up_sizes
from modelpress_compression.inputs import Array, InputData
from modelpress_compression.measure.accuracy import check_labels
from modelpress_compression.measure.input_scale import scale_warnings
from modelpress_compression.measure.task import Labelled
from modelpress_compression.model import Model
from modelpress_compression.runtime import open_session, run_all

ANSWERS = 4
_CHUNK = 1 << 20  # numbers of an array at a time
# Of the outputs' size: by less, answers to different samples hardly differ. Those of real networks differ by 0.4 and
# more; fed with inputs a thousand times too small, by 0.002 at most.
HARDLY_DIFFERENT = 0.002


def data_warnings(model: Model, path: Path, data: InputData, labelled: Labelled | None) -> list[str]:
    """Sentences on what looks wrong. `path`: the file of `model`.

    Raises InvalidDataError where labels fit no output, ModelNotRunnableError.
    """
    found = list(_oddities(model, path, data, "The data"))
    if not data.provided and (text := made_up_sizes(data)):
        found.append(text)
    if labelled is not None:
        found += _oddities(model, path, labelled.data.inputs, "The evaluation data")
        if note := check_labels(path, labelled.data, labelled.metric):
            found.append(note)
    return found


def _oddities(model: Model, path: Path, data: InputData, where: str) -> Iterator[str]:
    if not data.provided:
        return
    for text in data.oddities:
        yield f"{where}: {text}"
    if data.varied:
        for text in scale_warnings(model, data):
            yield f"{where}: {text}"
        if _answers_alike(path, data):
            yield (
                f"{where}: the model gives nearly the same answers to samples that differ. Check that they are scaled "
                f"as in training; as they are, they tell a good result from a bad one hardly at all."
            )


def _answers_alike(path: Path, data: InputData) -> bool:
    """Whether no output tells the samples apart."""
    feeds = list(data.spread(ANSWERS).feeds(1))
    if len(feeds) < 2 or all(_alike([feed[name] for feed in feeds]) for name in feeds[0]):
        return False
    answers = list(run_all(open_session(path), feeds))
    return all(_alike([answer[name] for answer in answers]) for name in answers[0])


def _alike(arrays: Sequence[Array]) -> bool:
    if arrays[0].dtype.kind not in "fiub":
        return False
    if any(array.shape != arrays[0].shape for array in arrays):
        return False
    spread = power = 0.0
    flat = [array.reshape(-1) for array in arrays]
    for start in range(0, flat[0].size, _CHUNK):  # a picture that is answered by pictures has millions of numbers
        stacked = np.stack([values[start : start + _CHUNK] for values in flat]).astype(np.float64)
        spread += float(np.square(stacked - stacked.mean(axis=0)).sum())
        power += float(np.square(stacked).sum())
    return math.sqrt(spread) <= HARDLY_DIFFERENT * math.sqrt(power)
