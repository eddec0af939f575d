"""Metrics of encoders.

- spearman: the rank correlation between labels and scores. An output with one number for each sample holds the scores,
  and labels are [N]. Of embeddings [N, D] or [N, T, D] the score is a cosine: of two consecutive samples, both of which
  have the pair's label; or, where a model has two embeddings [N, D] of one shape, of these two, with labels [N].
- retrieval: the share of samples whose nearest other sample, by cosine, is of the same group (recall at 1). Labels are
  group numbers [N], or [N, 2]: group, and 0 for queries, 1 for documents; queries are then answered by documents.
  Negative groups are left out, and so is who is alone in a group.

[N, T, D] is averaged over the positions that count. What holds NaN is like nothing else.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from modelpress_compression.errors import InvalidDataError
from modelpress_compression.graph.padding import counted_among
from modelpress_compression.inputs import Array
from modelpress_compression.measure.metrics.answers import cosines
from modelpress_compression.measure.metrics.base import Batch, Floats, Integers, Task, squeezed

MAX_BYTES = 1024**3  # 1 GiB of embeddings
MAX_SAMPLES = 50_000  # every one is compared with every other
_SENTENCE = "sentence_embedding"
_CHUNK_ROWS = 256


@dataclass
class Spearman:
    """`outputs`: one of scores or embeddings, or two whose cosine is the score. `paired`: samples belong two by two."""

    outputs: tuple[str, ...]
    paired: bool
    found: list[Floats] = field(default_factory=list)
    labels: list[Array] = field(default_factory=list)
    waiting: Floats | None = None  # of a pair, while the second is not there

    def add(self, batch: Batch) -> None:
        """As `Meter`."""
        rows = [_pooled(batch.outputs[name], batch.mask) for name in self.outputs]
        labels = batch.labels.reshape(-1)
        if len(rows) == 2:
            scores = cosines(rows[0].astype(np.float64), rows[1].astype(np.float64))
        elif self.paired:
            scores, labels = self._paired(rows[0].astype(np.float64), labels)
        else:
            scores = rows[0].reshape(len(labels)).astype(np.float64)
        self.found.append(scores)
        self.labels.append(labels)

    def _paired(self, rows: Floats, labels: Array) -> tuple[Floats, Array]:
        if self.waiting is not None:
            rows, labels = np.concatenate([self.waiting, rows]), np.concatenate([labels[:1], labels])
        whole = len(rows) // 2 * 2
        self.waiting = rows[whole:] if whole < len(rows) else None
        return cosines(rows[:whole:2], rows[1:whole:2]), labels[:whole:2]

    def value(self) -> float | None:
        """As `Meter`."""
        labels = np.concatenate(self.labels).astype(np.float64)
        if len(labels) < 2 or not np.ptp(labels):
            return None
        # An answer that is not finite ranks last, which is no advantage on average.
        scores = np.nan_to_num(np.concatenate(self.found), nan=-np.inf, posinf=np.inf, neginf=-np.inf)
        if scores.min() == scores.max():
            return 0.0  # all alike: it knows nothing of the order
        return float(np.corrcoef(_ranks(scores), _ranks(labels))[0, 1])


@dataclass
class Retrieval:
    """Recall at 1. Embeddings are kept in float32, of length one."""

    output: str
    rows: list[NDArray[np.float32]] = field(default_factory=list)
    labels: list[Array] = field(default_factory=list)

    def add(self, batch: Batch) -> None:
        """As `Meter`."""
        rows = np.nan_to_num(_pooled(batch.outputs[self.output], batch.mask).astype(np.float32), posinf=0.0, neginf=0.0)
        norms = np.linalg.norm(rows, axis=1, keepdims=True)
        self.rows.append((rows / np.where(norms > 0, norms, 1.0)).astype(np.float32))
        self.labels.append(batch.labels)

    def value(self) -> float | None:
        """As `Meter`."""
        rows, labels = np.concatenate(self.rows), np.concatenate(self.labels)
        groups = (labels[:, 0] if labels.ndim == 2 else labels).astype(np.int64)
        roles = labels[:, 1] if labels.ndim == 2 else None
        asks = np.flatnonzero((groups >= 0) & (True if roles is None else roles == 0))
        answers = np.flatnonzero((groups >= 0) & (True if roles is None else roles == 1))
        return _recall_at_1(rows, groups, asks, answers)


def spearman(task: Task) -> Spearman:
    """The meter for a model and its labels. Raises InvalidDataError."""
    labels = task.labels
    if squeezed(labels.shape[1:]) or not np.isfinite(labels).all():
        raise task.misfit(_SPEARMAN)
    if (scores := task.first(lambda array: array.ndim > 0 and array.size == len(array) == task.count)) is not None:
        return Spearman((scores,), paired=False)
    flat = labels.reshape(-1)
    pairs = len(flat) % 2 == 0 and bool((flat[::2] == flat[1::2]).all())
    names = _embeddings(task)
    if not names:
        raise task.misfit(_SPEARMAN)
    shapes = {task.outputs[name].shape for name in names}
    if not pairs and len(names) == 2 and len(shapes) == 1:
        return Spearman(tuple(names), paired=False)
    if not pairs:
        raise task.misfit(_SPEARMAN)
    _check_room(task, names[0])
    return Spearman((names[0],), paired=True)


def retrieval(task: Task) -> Retrieval:
    """The meter for a model and its labels. Raises InvalidDataError."""
    labels, names = task.labels, _embeddings(task)
    with_roles = labels.ndim == 2 and labels.shape[1] == 2 and bool(np.isin(labels[:, 1], (0, 1)).all())
    if labels.dtype.kind not in "iu" or not names or not (labels.ndim == 1 or with_roles):
        raise task.misfit(
            "Give whole numbers: a group for each sample [N], or group and role [N, 2] (0 asks, 1 answers), for an "
            "output of embeddings [N, D] or [N, T, D]."
        )
    _check_room(task, names[0])
    return Retrieval(names[0])


_SPEARMAN = (
    "Give one finite number for each sample: of an output with one score, or of two embeddings [N, D], the label of "
    "the sample; of one embedding [N, D] or [N, T, D] the label of the pair, twice, since samples 0 and 1, 2 and 3, "
    "and so on are pairs."
)


def _embeddings(task: Task) -> list[str]:
    """Outputs of embeddings, the likeliest first."""
    fitting = [
        name
        for name, array in task.outputs.items()
        if array.dtype.kind == "f" and array.ndim in (2, 3) and array.shape[0] == task.count and array.shape[-1] > 1
    ]
    return sorted(fitting, key=lambda name: name != _SENTENCE)


def _check_room(task: Task, name: str) -> None:
    samples, width = len(task.labels), task.outputs[name].shape[-1]
    if samples > MAX_SAMPLES or samples * width * 4 > MAX_BYTES:
        raise InvalidDataError(
            f"The evaluation data: {samples} embeddings of {width} numbers are more than {task.metric} compares with "
            f"each other ({MAX_SAMPLES}, and {MAX_BYTES >> 20} MiB). Give fewer samples."
        )


def _pooled(output: Array, mask: NDArray[np.bool_] | None) -> Array:
    """[N, T, D] averaged over the positions that count; all else as it is."""
    if output.ndim != 3:
        return output
    counted = counted_among(output.shape[:2], mask)
    if counted is None or counted.ndim != 2:
        return np.asarray(output.astype(np.float64).mean(axis=1))
    weights = counted[..., None].astype(np.float64)
    # Positions that do not count may hold anything.
    sums = np.where(weights > 0, output, 0).sum(axis=1, dtype=np.float64)
    return np.asarray(sums / np.maximum(weights.sum(axis=1), 1.0))


def _ranks(values: Floats) -> Floats:
    """From 1; equal values share the mean of their ranks."""
    _, places, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    ranks: Floats = (last - (counts - 1) / 2)[places]
    return ranks


def _recall_at_1(rows: NDArray[np.float32], groups: Integers, asks: Integers, answers: Integers) -> float | None:
    if not len(asks) or not len(answers):
        return None
    pool, right, counted = rows[answers].T, 0, 0
    for start in range(0, len(asks), _CHUNK_ROWS):
        mine = asks[start : start + _CHUNK_ROWS]
        same_group = groups[mine, None] == groups[answers]
        itself = mine[:, None] == answers
        has_answer = (same_group & ~itself).any(axis=1)
        nearest = np.where(itself, -np.inf, rows[mine] @ pool).argmax(axis=1)
        # A row of zeros, which NaN has become, is like nothing.
        found = same_group[np.arange(len(mine)), nearest] & rows[mine].any(axis=1)
        right += int(np.count_nonzero(found & has_answer))
        counted += int(np.count_nonzero(has_answer))
    return right / counted if counted else None
