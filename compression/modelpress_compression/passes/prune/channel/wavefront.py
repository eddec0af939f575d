"""Runs a model piece by piece over all samples: what is asked for, and what it takes to go on from there.

    front = Wavefront(model, feeds, wanted, ...)
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
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import numpy as np
import onnx_ir
import onnxruntime as ort

from modelpress_compression.graph.read import is_op
from modelpress_compression.graph.subgraphs import read_values
from modelpress_compression.inputs import Array, Feeds
from modelpress_compression.model import Model
from modelpress_compression.runtime import run, session_of

Values = dict[str, Array]


@dataclass(frozen=True)
class _Piece:
    """Nodes that run together; `reads`: values from before, `makes`: those that are asked for or read later."""

    nodes: tuple[onnx_ir.Node, ...]
    reads: tuple[onnx_ir.Value, ...]
    makes: tuple[onnx_ir.Value, ...]


class Wavefront:
    """`feeds`: the samples, from the first one at every call; `wanted`: names of all values of the main graph that will
    be asked for, as often as they will be; `budget_bytes`: for what is kept of all samples."""

    def __init__(
        self,
        model: Model,
        feeds: Callable[[], Iterator[Feeds]],
        wanted: Sequence[str],
        budget_bytes: int,
        check_time: Callable[[], None],
    ) -> None:
        self._model, self._feeds, self._check_time = model, feeds, check_time
        self._budget_bytes = budget_bytes
        self._wanted = Counter(wanted)
        self._makers: dict[str, onnx_ir.Value] = {}
        self._places: dict[onnx_ir.Node, int] = {}
        self._readers: dict[onnx_ir.Value, list[onnx_ir.Node]] = defaultdict(list)
        for place, node in enumerate(model.graph):
            self._places[node] = place
            self._makers.update((value.name, value) for value in node.outputs if value.name)
            for value in _computed(node, model.graph):
                self._readers[value].append(node)
        self._ran: set[onnx_ir.Node] = set()
        self._alive: list[onnx_ir.Value] = []
        self._kept: list[Values] = []  # of each sample; empty before the first piece

    def advance(self, names: Sequence[str]) -> Iterator[Values]:
        """What these values hold, sample by sample; to be exhausted. Raises ModelNotRunnableError, TimeLimitError."""
        asked = sorted(set(names))
        self._wanted -= Counter(names)
        piece = self._piece(asked)
        alive = self._still_needed(piece)
        kept: list[Values] | None = [] if all(_is_tensor(value) for value in alive) else None
        used = 0
        with ExitStack() as stack:
            session = None
            for index, feed in enumerate(self._feeds()):
                self._check_time()
                values = {**feed, **(self._kept[index] if self._kept else {})}
                if piece.makes and session is None:
                    session = stack.enter_context(_session(piece, self._model, values))
                if session is not None:
                    values |= run(session, values)
                yield {name: values[name] for name in asked}
                if kept is not None:
                    kept.append({value.name or "": values[value.name or ""] for value in alive})
                    used += sum(np.asarray(array).nbytes for array in kept[-1].values())
                    kept = kept if used <= self._budget_bytes else None
        if kept is not None:
            self._kept, self._alive = kept, alive
            self._ran.update(node for node in piece.nodes if not is_op(node, "Constant"))

    def _piece(self, names: Sequence[str]) -> _Piece:
        """What these values need and that did not run yet."""
        nodes: set[onnx_ir.Node] = set()
        reads: dict[onnx_ir.Value, None] = {}
        asked = [self._makers[name] for name in names if name in self._makers]
        waiting = list(asked)
        while waiting:
            value = waiting.pop()
            node = value.producer()
            if node is None or node in self._ran:
                reads[value] = None
            elif node not in nodes:
                nodes.add(node)
                waiting += _computed(node, self._model.graph)
        order = tuple(sorted(nodes, key=self._places.__getitem__))
        piece = _Piece(order, tuple(reads), ())
        made = {value for node in order for value in node.outputs}
        makes = dict.fromkeys(value for value in [*asked, *self._still_needed(piece)] if value in made)
        return _Piece(order, tuple(reads), tuple(makes))

    def _still_needed(self, piece: _Piece) -> list[onnx_ir.Value]:
        """Computed values, this piece's included, that a later node reads or that are asked for later."""
        running = set(piece.nodes)
        candidates = [*self._alive, *(value for node in piece.nodes for value in node.outputs)]
        return [
            value
            for value in candidates
            if not is_op(value.producer(), "Constant")
            and (
                value.name in self._wanted
                or any(node not in running and node not in self._ran for node in self._readers[value])
            )
        ]


def _computed(node: onnx_ir.Node, graph: onnx_ir.Graph) -> Iterator[onnx_ir.Value]:
    """The inputs and computed values of the graph that the node reads."""
    return (value for value in read_values(node) if value.graph is graph and not value.is_initializer())


def _is_tensor(value: onnx_ir.Value) -> bool:
    return value.type is None or isinstance(value.type, onnx_ir.TensorType)


def _initializers(node: onnx_ir.Node, graph: onnx_ir.Graph) -> Iterator[onnx_ir.Value]:
    return (value for value in read_values(node) if value.graph is graph and value.is_initializer())


@contextmanager
def _session(piece: _Piece, model: Model, example: Values) -> Iterator[ort.InferenceSession]:
    """The piece as a model of its own; `example` tells types that the graph does not."""
    constants = dict.fromkeys(value for node in piece.nodes for value in _initializers(node, model.graph))
    view = onnx_ir.GraphView(
        piece.reads,
        piece.makes,
        nodes=piece.nodes,
        initializers=tuple(constants),
        opset_imports=dict(model.graph.opset_imports),
        name="piece",
    )
    graph = view.clone()
    for value in graph.inputs:
        # What the exporter recorded may hold for its example alone.
        value.shape = None
        if value.type is None:
            value.type = onnx_ir.TensorType(onnx_ir.DataType.from_numpy(example[value.name or ""].dtype))
    for value in graph.outputs:
        value.shape = value.type = None  # onnxruntime finds out
    piece_model = Model(onnx_ir.Model(graph, ir_version=model.ir.ir_version), model.provenance)
    with session_of(piece_model) as session:
        yield session
