"""How far an optimized model's outputs are from the original's, streamed: no output is kept.

Per output, pooled over all elements of all samples, in float64:

- `cosine`: <a, b> / (|a| |b|). Two all-zero outputs have 1.
- `sqnr_db`: 10 log10(sum a^2 / sum (a - b)^2), held within +-200 dB: 200 means "identical to float precision".
- `max_abs_error`: largest |a - b|.

Where both are NaN, or the same infinity, the element counts as equal and is left out of the sums. Where only one of
them is finite, the element is left out too, but counted: one such element makes `cosine` 0. Integer, bool and string
outputs have `equal`, the share of equal elements, instead.

Positions of a sequence [N, T, ...] that an attention mask among the inputs leaves out are not compared, since nobody
reads them.

Where outputs are a selection, such as boxes, both models select what the original selects, and the scores that are
selected by are compared beside the outputs (see `graph.selections`). Models that do not fit into memory together, and
those that select otherwise, are compared row by row.

`top1_agreement`: share of positions with the same largest element, for the first output [N, C] or [N, T, C], C >= 2,
that may hold class scores (see `graph.outputs`) or does hold probabilities.

`expected_top1` and `expected_drop`: the accuracy that the original expects of itself by its own probabilities p, and
how much of it is lost where the class changed from a to b: mean(p(a)) and mean(p(a) - p(b)). A change between two
classes of nearly the same probability costs next to nothing; a change away from a class that the original was sure of
costs a whole answer. Labels are not needed. `positions`: how many such answers there were.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory, TemporaryFile
from typing import Any

import numpy as np
import onnx_ir
from numpy.typing import NDArray

from modelpress_compression.backends.base import Backend
from modelpress_compression.backends.cpu import CPU
from modelpress_compression.decibels import MAX_SQNR_DB, decibels
from modelpress_compression.errors import ModelNotRunnableError, UnsupportedOperatorError
from modelpress_compression.graph.outputs import classification_outputs
from modelpress_compression.graph.padding import counted_positions, without_padding
from modelpress_compression.graph.selections import Alike, Selections, asked_alike, selections_of
from modelpress_compression.inputs import Array, Feeds, InputData
from modelpress_compression.model import Model, Provenance, file_size_bytes, read_ir
from modelpress_compression.parallel import map_in_order
from modelpress_compression.runtime import fit_together, open_together

DEFAULT_LIMIT = 256
# Outputs of one model that are kept for the next comparison.
KNOWN_BYTES = 256 * 1024**2
# Outputs of the original that wait on the disk, of models that take turns: beyond these no more samples are taken.
WAITING_BYTES = 1024**3  # 1 GiB
# What such a comparison may take at most: runs of large models are long, and a few samples have many outputs.
TURNS_BUDGET_S = 120.0


@dataclass(frozen=True)
class OutputFidelity:
    """One output. Floats have `cosine`, `sqnr_db`, `max_abs_error`; other types `equal`. None: not measured."""

    cosine: float | None
    sqnr_db: float | None
    max_abs_error: float | None
    equal: float | None = None

    def to_dict(self) -> dict[str, float | None]:
        figures = {"cosine": self.cosine, "sqnr_db": self.sqnr_db, "max_abs_error": self.max_abs_error}
        return figures if self.equal is None else figures | {"equal": self.equal}


@dataclass(frozen=True)
class Fidelity:
    """All outputs. `agreement`, in [0, 1]: `top1_agreement` if there is one, else the mean over outputs of cosine (at
    least 0) or share of equal elements; without labels, `max_drop` bounds its distance from 1. `notes`: oddities.

    `expected_top1`, `expected_drop`: see above; None where no output holds classes."""

    data: str
    samples: int
    outputs: Mapping[str, OutputFidelity]
    top1_agreement: float | None
    agreement: float
    notes: tuple[str, ...] = ()
    expected_top1: float | None = None
    expected_drop: float | None = None
    comparable: bool = True  # every output is there, in its shape
    positions: int = 0  # with a class, over all samples

    @classmethod
    def from_facts(cls, facts: Mapping[str, Any]) -> Fidelity:
        """The inverse of `dataclasses.asdict`, also where it went through JSON."""
        outputs = {name: OutputFidelity(**output) for name, output in facts["outputs"].items()}
        return cls(**{**facts, "outputs": outputs, "notes": tuple(facts["notes"])})

    @property
    def cosine(self) -> float:
        """That of the worst output, where integers count with their share of equal elements; 0 where outputs could not
        be compared."""
        figures = [output.equal if output.cosine is None else output.cosine for output in self.outputs.values()]
        return min((figure for figure in figures if figure is not None), default=1.0) if self.comparable else 0.0

    @property
    def sqnr_db(self) -> float:
        """The worst float output's; 200 where there is none, and -200 if an output could not be compared."""
        figures = [output.sqnr_db for output in self.outputs.values() if output.sqnr_db is not None]
        return min(figures, default=MAX_SQNR_DB) if self.comparable else -MAX_SQNR_DB

    def kept(self, metric: str | None) -> tuple[str, float]:
        """(name, figure) that takes the place of the metric without labels: the worst output's cosine if that is the
        metric, else `agreement`."""
        return ("cosine", self.cosine) if metric == "cosine" else ("agreement", self.agreement)

    def to_dict(self) -> dict[str, Any]:
        """The report's `fidelity`."""
        return {
            "data": self.data,
            "samples": self.samples,
            "outputs": {name: output.to_dict() for name, output in self.outputs.items()},
            "top1_agreement": self.top1_agreement,
            "agreement": self.agreement,
            "expected_top1": self.expected_top1,
            "expected_drop": self.expected_drop,
            "notes": list(self.notes),
        }


@dataclass
class KnownOutputs:
    """Outputs of one model on the feeds of one data, kept for the next comparison while they fit into memory.

    `selections`: what the model tells of its selections, once `selected` was asked.
    """

    limit_bytes: int = KNOWN_BYTES
    selections: Selections | None = None
    _looked: bool = False
    _outputs: dict[int, Mapping[str, Array]] = field(default_factory=dict)
    _bytes: int = 0

    def __len__(self) -> int:
        return len(self._outputs)

    def selected(self, find: Callable[[], Selections | None]) -> Selections | None:
        """What `find` finds, the first time."""
        if not self._looked:
            self.selections, self._looked = find(), True
        return self.selections

    def get(self, feed: int) -> Mapping[str, Array] | None:
        """Those of the feed with this number."""
        return self._outputs.get(feed)

    def keep(self, feed: int, outputs: Mapping[str, Array]) -> None:
        """Unless that would take too much memory."""
        size = sum(array.nbytes for array in outputs.values())
        if feed not in self._outputs and self._bytes + size <= self.limit_bytes:
            self._outputs[feed] = outputs
            self._bytes += size


def compare_outputs(
    original: Path,
    optimized: Path,
    data: InputData,
    *,
    limit: int = DEFAULT_LIMIT,
    budget_s: float | None = None,
    known: KnownOutputs | None = None,
    backend: Backend = CPU,
) -> Fidelity:
    """Runs both models on at most `limit` samples, one at a time, and compares the outputs.

    Models that do not fit into memory together get two minutes, within which not all samples may be reached.

    One at a time, because dynamic quantization chooses its ranges per batch. `budget_s`: stop taking samples after so
    many seconds; `samples` says how many there were. `known`: outputs of the original on this data; those that are
    found are kept there. `backend`: what the optimized model runs in; the original runs in onnxruntime in any case.
    Raises ModelNotRunnableError, UnsupportedOperatorError.
    """
    known = known if known is not None else KnownOutputs(0)
    pair = _Pair(original, optimized, known, backend)
    ir = read_ir(original)
    classes = classification_outputs(ir.graph)
    deadline = math.inf if budget_s is None else time.monotonic() + budget_s
    with TemporaryDirectory(prefix="modelpress-") as folder:
        pair = _asked_alike(pair, ir, data, Path(folder))
        if pair.alike is not None and pair.alike.selections is not None and pair.alike.obeys:
            values, note = tuple(pair.alike.selections.scores.values()), pair.alike.selections.note
            try:
                found = compare_answers(pair.answers(data.feeds(1, limit), deadline), classes, data, values)
                return replace(found, notes=(*found.notes, note))
            except (ModelNotRunnableError, UnsupportedOperatorError):
                # The optimized model does not run on what the original selects.
                pair = replace(pair, optimized=optimized, alike=replace(pair.alike, obeys=False))
        return compare_answers(pair.answers(data.feeds(1, limit), deadline), classes, data)


def _asked_alike(pair: _Pair, ir: onnx_ir.Model, data: InputData, folder: Path) -> _Pair:
    """The pair with files in the `folder` that are asked with the original's selections, where outputs are some. `ir`:
    the original."""
    if not fit_together(map(file_size_bytes, (pair.original, pair.optimized))):
        return pair
    original = Model(ir, Provenance("onnx", "", file_size_bytes(pair.original)))
    selections = pair.known.selected(lambda: selections_of(original, data.feeds(1)))
    if selections is None:
        return pair
    optimized = Model(read_ir(pair.optimized), Provenance("onnx", "", file_size_bytes(pair.optimized)))
    # What is kept of the original's outputs has what it told in any case.
    alike = asked_alike(original, optimized, selections)
    alike.first.save(folder / "original.onnx")
    if alike.obeys:
        alike.second.save(folder / "optimized.onnx")
    paths = folder / "original.onnx", folder / "optimized.onnx" if alike.obeys else pair.optimized
    return replace(pair, original=paths[0], optimized=paths[1], alike=alike)


Answers = tuple[Feeds, Mapping[str, Array], Mapping[str, Array]]


def compare_answers(
    answers: Iterable[Answers], classes: Collection[str], data: InputData, values: Collection[str] = ()
) -> Fidelity:
    """The same of answers that are there: for each feed of the `data`, outputs before and after. `classes`: names of
    the outputs that hold classes; `values`: of those that do not, even where they sum up to one."""
    sums: dict[str, OutputSums] = {}
    partners: dict[str, str] = {}
    samples = 0
    for feed, before, after in answers:
        if not sums:
            sums = {name: OutputSums() for name in before}
            partners = _partners(list(before), list(after))
        mask = counted_positions(feed)
        for name, total in sums.items():
            holds = False if name in values else name in classes or None
            total.add(before[name], after.get(partners.get(name, "")), holds, mask)
        samples += data.feed_size
    return _summary("provided" if data.provided else "synthetic", samples, sums)


@dataclass(frozen=True)
class _Pair:
    """Two models that answer the same feeds. Large ones take turns: the original's answers wait in a file.

    `alike`: how they are asked where outputs are a selection.
    """

    original: Path
    optimized: Path
    known: KnownOutputs
    backend: Backend
    alike: Alike | None = None

    def answers(self, feeds: Iterable[Feeds], deadline: float) -> Iterator[Answers]:
        """Feed by feed, both models' outputs, until time is up; at least one."""
        if fit_together(map(file_size_bytes, (self.original, self.optimized))):
            return self._together(feeds, deadline)
        return self._in_turn(feeds, deadline)

    def _together(self, feeds: Iterable[Feeds], deadline: float) -> Iterator[Answers]:
        openers = [partial(one.open, comparable=True) for one in (CPU, self.backend)]
        first, second = open_together([self.original, self.optimized], openers)

        def answer(numbered: tuple[int, Feeds]) -> tuple[int, Answers]:
            number, feed = numbered
            before = self.known.get(number) or first.run(feed)
            given = {} if self.alike is None else self.alike.given(before)
            return number, (feed, before, second.run({**feed, **given}))

        for number, (feed, before, after) in map_in_order(answer, enumerate(feeds)):
            self.known.keep(number, before)
            yield feed, *((before, after) if self.alike is None else self.alike.compared(before, after))
            if time.monotonic() > deadline:
                return

    def _in_turn(self, feeds: Iterable[Feeds], deadline: float) -> Iterator[Answers]:
        feeds = list(feeds)
        now = time.monotonic()
        deadline = min(deadline, now + TURNS_BUDGET_S)
        with WaitingOutputs(self.optimized.parent) as waiting:
            count = self._ask_original(feeds, now + (deadline - now) / 2, waiting)
            runner = self.backend.open(self.optimized, comparable=True)
            answers = map_in_order(runner.run, feeds[:count])
            for number, (feed, after) in enumerate(zip(feeds, answers, strict=False)):
                yield feed, self.known.get(number) or waiting.get(number), after
                if time.monotonic() > deadline:
                    return

    def _ask_original(self, feeds: Sequence[Feeds], deadline: float, waiting: WaitingOutputs) -> int:
        """How many of the feeds there is an answer to."""
        known = [self.known.get(number) is not None for number in range(len(feeds))]
        if all(known):
            return len(feeds)
        runner = CPU.open(self.original, comparable=True)
        answers = map_in_order(lambda number: None if known[number] else runner.run(feeds[number]), range(len(feeds)))
        for number, before in enumerate(answers):
            if before is not None:
                self.known.keep(number, before)
                if self.known.get(number) is None:
                    waiting.put(number, before)
            if time.monotonic() > deadline or waiting.full:
                return number + 1
        return len(feeds)


class WaitingOutputs:
    """Outputs of one model in a file of a folder, until the other model's are there."""

    def __init__(self, folder: Path) -> None:
        self._file = TemporaryFile(dir=folder)  # noqa: SIM115  closed by __exit__
        self._places: dict[int, dict[str, tuple[int, np.dtype[Any], tuple[int, ...]]]] = {}
        self._strings: dict[int, dict[str, Array]] = {}

    def __enter__(self) -> WaitingOutputs:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    @property
    def full(self) -> bool:
        """Whether there are so many that no further samples should be taken."""
        return self._file.tell() > WAITING_BYTES

    def put(self, number: int, outputs: Mapping[str, Array]) -> None:
        """Those of the feed with this number."""
        places = self._places.setdefault(number, {})
        self._strings[number] = {name: array for name, array in outputs.items() if array.dtype.hasobject}
        for name, array in outputs.items():
            if array.dtype.hasobject:
                continue
            places[name] = (self._file.seek(0, os.SEEK_END), array.dtype, array.shape)
            self._file.write(array.tobytes())

    def get(self, number: int) -> dict[str, Array]:
        """The same again."""
        found = dict(self._strings[number])
        for name, (place, dtype, shape) in self._places[number].items():
            self._file.seek(place)
            data = self._file.read(math.prod(shape) * dtype.itemsize)
            found[name] = np.frombuffer(data, dtype).reshape(shape)
        return found


def _partners(original: list[str], optimized: list[str]) -> dict[str, str]:
    """Outputs of the same name, or, where names were changed throughout, in the same place."""
    if set(original) <= set(optimized):
        return {name: name for name in original}
    if len(original) == len(optimized):
        return dict(zip(original, optimized, strict=True))
    return {name: name for name in set(original) & set(optimized)}


@dataclass
class OutputSums:
    """Running sums of one output: `add` what both models give for each feed, then ask."""

    dot: float = 0.0
    squares: list[float] = field(default_factory=lambda: [0.0, 0.0])
    error_squares: float = 0.0
    max_abs_error: float = 0.0
    elements: int = 0
    equal_elements: int = 0
    not_finite: int = 0
    floats: bool = False
    top1_positions: int = 0
    top1_agreed: int = 0
    expected_right: float = 0.0
    expected_lost: float = 0.0
    problem: str = ""

    def add(
        self, before: Array, after: Array | None, classes: bool | None, mask: NDArray[np.bool_] | None = None
    ) -> None:
        """`classes`: whether the last axis may be class scores; None: where it holds probabilities. `mask`: positions
        [N, T] that count."""
        if after is None:
            self.problem = "is missing in the optimized model"
            return
        if before.shape != after.shape:
            self.problem = f"has shape {before.shape} in the original and {after.shape} in the optimized model"
            return
        before, after = without_padding(before, mask), without_padding(after, mask)
        if before.dtype.kind not in "fV" or after.dtype.kind not in "fV":
            self.elements += before.size
            self.equal_elements += int(np.count_nonzero(before == after))
            return
        self.floats = True
        self._add_floats(before.astype(np.float64), after.astype(np.float64))
        holds = _are_probabilities(before) if classes is None else classes
        if before.ndim in (2, 3) and before.shape[-1] >= 2 and holds:
            self._add_classes(before, after)

    def _add_classes(self, before: Array, after: Array) -> None:
        first, second = (np.argmax(array, axis=-1)[..., None] for array in (before, after))
        self.top1_positions += first.size
        self.top1_agreed += int(np.count_nonzero(first == second))
        probabilities = _probabilities(before.astype(np.float64))
        taken, given = (np.take_along_axis(probabilities, index, axis=-1) for index in (first, second))
        self.expected_right += float(taken.sum())
        self.expected_lost += float((taken - given).sum())

    def expectations(self) -> tuple[float, float]:
        """(expected_top1, expected_drop): means over all positions."""
        return self.expected_right / self.top1_positions, self.expected_lost / self.top1_positions

    def _add_floats(self, before: NDArray[np.float64], after: NDArray[np.float64]) -> None:
        finite = np.isfinite(before) & np.isfinite(after)
        if not finite.all():
            same = (before == after) | (np.isnan(before) & np.isnan(after))
            self.not_finite += int(np.count_nonzero(~finite & ~same))
            before, after = before[finite], after[finite]
        self.elements += before.size
        if not before.size:
            return
        first, second = before.ravel(), after.ravel()
        error = first - second
        self.dot += float(first @ second)
        self.squares[0] += float(first @ first)
        self.squares[1] += float(second @ second)
        self.error_squares += float(error @ error)
        self.max_abs_error = max(self.max_abs_error, float(np.abs(error).max()))

    def cosine(self) -> float:
        if self.not_finite:
            return 0.0
        norms = math.sqrt(self.squares[0]) * math.sqrt(self.squares[1])
        if norms == 0.0:
            return 1.0 if self.squares[0] == self.squares[1] else 0.0
        return min(1.0, max(-1.0, self.dot / norms))

    def sqnr_db(self) -> float:
        return decibels(self.error_squares, self.squares[0])

    def figures(self) -> OutputFidelity:
        if self.problem or not (self.elements or self.not_finite):
            return OutputFidelity(None, None, None)
        if not self.floats:
            return OutputFidelity(None, None, None, equal=self.equal_elements / self.elements)
        if not self.elements:
            return OutputFidelity(self.cosine(), None, None)
        return OutputFidelity(self.cosine(), self.sqnr_db(), self.max_abs_error)

    def agreement(self) -> float | None:
        """In [0, 1]; None where the output was empty throughout."""
        if self.problem:
            return 0.0
        if not (self.elements or self.not_finite):
            return None
        return max(0.0, self.cosine()) if self.floats else self.equal_elements / self.elements


def _are_probabilities(scores: NDArray[Any]) -> bool:
    """Whether every row sums up to one without negative entries: class scores, whatever made them."""
    return bool(scores.size) and float(scores.min()) >= 0 and bool(np.allclose(scores.sum(axis=-1), 1, atol=1e-3))


def _probabilities(scores: NDArray[np.float64]) -> NDArray[np.float64]:
    """Class scores as probabilities: as they are where they are some already, else their softmax."""
    if _are_probabilities(scores):
        return scores
    finite = np.nan_to_num(scores, nan=-np.inf)
    powers = np.exp(finite - np.max(finite, axis=-1, keepdims=True))
    return np.asarray(powers / powers.sum(axis=-1, keepdims=True), np.float64)


def _summary(data: str, samples: int, sums: Mapping[str, OutputSums]) -> Fidelity:
    notes = [f"Output {name!r} {total.problem}." for name, total in sums.items() if total.problem]
    notes += [
        f"Output {name!r}: {total.not_finite} elements are finite in only one of the models."
        for name, total in sums.items()
        if total.not_finite
    ]
    classifier = next((total for total in sums.values() if total.top1_positions), None)
    top1 = classifier.top1_agreed / classifier.top1_positions if classifier else None
    agreements = [value for total in sums.values() if (value := total.agreement()) is not None]
    agreement = top1 if top1 is not None else (sum(agreements) / len(agreements) if agreements else 1.0)
    comparable = not any(total.problem for total in sums.values())
    if not comparable:
        agreement = 0.0
    outputs = {name: total.figures() for name, total in sums.items()}
    right, lost = classifier.expectations() if classifier else (None, None)
    positions = classifier.top1_positions if classifier else 0
    return Fidelity(data, samples, outputs, top1, agreement, tuple(notes), right, lost, comparable, positions)
