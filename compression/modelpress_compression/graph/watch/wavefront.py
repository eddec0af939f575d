"""Runs a model piece by piece over all samples: what is asked for, and what it takes to go on from there.

    front = Wavefront(model, samples, wanted, ...)
    for values in front.advance(["a"]): ...      # runs what "a" needs
    ...                                          # layers behind "a" may change now
    for values in front.advance(["b"]): ...      # runs what "b" needs beyond that

Every node so runs once for each sample, however many pieces there are. Of each sample those values are kept that a node
still to come reads; where they take more memory than permitted, the next piece starts where they last fitted: from the
inputs, if they never did.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from itertools import chain

import onnx_ir

from modelpress_compression.graph.read import is_op
from modelpress_compression.graph.subgraphs import needed_nodes, read_values
from modelpress_compression.graph.watch.extract import extract
from modelpress_compression.inputs import Array, InputData, values_bytes
from modelpress_compression.model import Model
from modelpress_compression.parallel import map_ahead
from modelpress_compression.runtime import run, session_of

Values = dict[str, Array]


@dataclass(frozen=True)
class _Piece:
    """Nodes that run together; `makes`: the values that are asked for or read later."""

    nodes: Sequence[onnx_ir.Node]
    makes: Sequence[onnx_ir.Value]


class Wavefront:
    """`wanted`: names of all values of the main graph that will be asked for, as often as they will be; `budget_bytes`:
    for what is kept of all samples. While a piece runs that much is held twice: what it starts from, what it makes."""

    def __init__(
        self,
        model: Model,
        samples: InputData,
        wanted: Sequence[str],
        budget_bytes: int,
        check_time: Callable[[], None],
    ) -> None:
        self._model, self._samples, self._check_time = model, samples, check_time
        self._budget_bytes = budget_bytes
        self._wanted = Counter(wanted)
        self._made = {value.name: value for node in model.graph for value in node.outputs if value.name}
        self._readers: dict[onnx_ir.Value, list[onnx_ir.Node]] = defaultdict(list)
        for node in model.graph:
            for value in read_values(node):
                self._readers[value].append(node)
        self._ran: set[onnx_ir.Node] = set()
        self._alive: list[onnx_ir.Value] = []  # what is kept
        self._kept: list[Values] = []  # of each sample; empty before the first piece

    def advance(self, names: Sequence[str]) -> Iterator[Values]:
        """What these values hold, sample by sample; to be exhausted. What was handed out is emptied before the next
        sample runs. Raises ModelNotRunnableError, TimeLimitError."""
        asked = sorted(set(names))
        self._wanted -= Counter(names)
        piece = self._piece(asked)
        alive = self._still_needed(piece.nodes)
        # Sequences and optionals have no size to count: they are computed again.
        kept: list[Values] | None = [] if all(_is_tensor(value) for value in alive) else None
        used_bytes, count = 0, self._samples.feed_count
        for values in self._run(piece):
            handed_out = {name: values[name] for name in asked}
            yield handed_out
            handed_out.clear()
            if kept is not None:
                kept.append({value.name or "": values[value.name or ""] for value in alive})
                used_bytes += values_bytes(kept[-1])
                # Samples are much alike: the first one tells that all together will be too many.
                if max(used_bytes, count * values_bytes(kept[0])) > self._budget_bytes:
                    kept = None
            values.clear()
        if kept is not None:
            self._kept, self._alive = kept, alive
            # A constant costs nothing, and is in every piece that reads it.
            self._ran.update(node for node in piece.nodes if not is_op(node, "Constant"))

    def _run(self, piece: _Piece) -> Iterator[Values]:
        """Of each sample what was kept, what the piece makes, and the feed."""
        given = (
            {**feed, **(self._kept[index] if self._kept else {})}
            for index, feed in enumerate(self._samples.feeds(batch_size=1))
        )
        with ExitStack() as stack:
            if piece.makes and (first := next(given, None)) is not None:
                session = stack.enter_context(session_of(self._part(piece, first)))
                ran = map_ahead(lambda values: values | run(session, values), chain([first], given), values_bytes)
                given = stack.enter_context(closing(ran))
            for values in given:
                self._check_time()
                yield values

    def _piece(self, names: Sequence[str]) -> _Piece:
        """What these values need and that did not run yet."""
        asked = [self._made[name] for name in names if name in self._made]
        given = {value for node in self._ran for value in node.outputs}
        nodes = needed_nodes(self._model.graph, given, asked)
        running = {value for node in nodes for value in node.outputs}
        makes = dict.fromkeys(value for value in [*asked, *self._still_needed(nodes)] if value in running)
        return _Piece(nodes, tuple(makes))

    def _still_needed(self, running: Sequence[onnx_ir.Node]) -> list[onnx_ir.Value]:
        """Computed values, those of the running nodes included, that a later node reads or that are asked for later."""
        past = self._ran.union(running)
        candidates = [*self._alive, *(value for node in running for value in node.outputs)]
        return [
            value
            for value in candidates
            if not is_op(value.producer(), "Constant")
            and (value.name in self._wanted or any(node not in past for node in self._readers[value]))
        ]

    def _part(self, piece: _Piece, example: Values) -> Model:
        """The piece as a model; `example` tells types that the graph does not."""
        given = [value.name for node in self._ran for value in node.outputs if value.name]
        part = extract(self._model, [value.name or "" for value in piece.makes], given)
        for value in part.graph.inputs:
            if value.type is None:
                value.type = onnx_ir.TensorType(onnx_ir.DataType.from_numpy(example[value.name or ""].dtype))
        return part


def _is_tensor(value: onnx_ir.Value) -> bool:
    return value.type is None or isinstance(value.type, onnx_ir.TensorType)
