"""Outputs that are a selection, such as the boxes that a detector leaves of many, and how two models are asked alike.

Which of two nearly equal boxes comes first, and whether one with a score near the threshold is there at all, the last
digits of the scores decide. Row by row such outputs of two models say little, even where both find the same things. So
models that are compared select what the original selects:

    telling      gives, beside its outputs, what its nodes select (indices), and what from (scores)
    obeying      is given these indices in the place of those that its own nodes would select

    compared     outputs, whose rows now stand for the same candidates in both; scores of all candidates, in which
                 stands what one model alone would have found

Nodes that select: TopK of floats; NonMaxSuppression; NonZero of floats, or of their comparison with a threshold; and a
Loop, Scan or If around a NonMaxSuppression, unless it computes with weights: its outputs are told as a whole.

The same operators route tokens to experts, or look for the nearest neighbours of a point: their order plays no part
then, and another choice is an error. So it is tried: outputs are a selection where the original, given its own
selections in reverse, answers otherwise.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import islice

import numpy as np
import onnx_ir

from modelpress_compression.agreement import why_different
from modelpress_compression.errors import ModelNotRunnableError, UnsupportedOperatorError
from modelpress_compression.graph.edit import Editor
from modelpress_compression.graph.read import input_of, int_attribute, is_constant, is_op
from modelpress_compression.graph.subgraphs import read_values, subgraphs
from modelpress_compression.inputs import Array, Feeds
from modelpress_compression.model import Model
from modelpress_compression.runtime import run, session_of

# How the outputs of a telling model begin that are not the model's own.
_CHOSEN, _SCORES = "modelpress.chosen.", "modelpress.scores."
# Feeds on which the reverse is tried: of a picture without any box there is none.
TRIED = 8
_THRESHOLDS = ("Greater", "GreaterOrEqual", "Less", "LessOrEqual")
# Between a comparison and the NonZero that finds where it holds.
_CONDITIONS = ("And", "Or", "Not", "Cast", "Identity", "Reshape", "Squeeze", "Unsqueeze", "Flatten", "Transpose")
# Through these scores stay what they are; behind some of them they are fewer.
_MOVING = ("Identity", "Cast", "Reshape", "Squeeze", "Unsqueeze", "Flatten", "Transpose", "Slice", "Concat")
_GATHERING = ("Gather", "GatherND", "GatherElements", "TopK")
_AROUND = ("Loop", "Scan", "If")
_WEIGHTED = frozenset(("Conv", "ConvTranspose", "MatMul", "Gemm", "LSTM", "GRU", "RNN", "Einsum"))
_GATHER_ELEMENTS_SINCE = 11


@dataclass(frozen=True)
class Selections:
    """What is told of one model.

    `chosen`: name of an output that tells indices -> element type and rank. `same`: name of one -> the first that has
    told the same in every feed, which passes may have merged it with. `scores`: name of an output that tells scores ->
    name of the value that holds them. `outputs`: names of the model's own.
    """

    chosen: Mapping[str, tuple[onnx_ir.DataType, int]]
    same: Mapping[str, str]
    scores: Mapping[str, str]
    outputs: tuple[str, ...]

    def own(self, told: Mapping[str, Array]) -> dict[str, Array]:
        """Of what a telling model answered, the model's own outputs."""
        return {name: told[name] for name in self.outputs if name in told}

    def given(self, told: Mapping[str, Array]) -> dict[str, Array]:
        """Of what a telling model answered, what an obeying one is fed beside its inputs."""
        return {name: told[name] for name in self.chosen}

    def compared(
        self, before: Mapping[str, Array], after: Mapping[str, Array]
    ) -> tuple[dict[str, Array], dict[str, Array]]:
        """What is compared of a telling model's answers and those of the one that obeyed: outputs, and scores by the
        names of their values, as far as both have them. Scores that are masked out, with infinities, are zeros."""
        own = self.own(before)
        other = {name: array for name, array in after.items() if not name.startswith((_CHOSEN, _SCORES))}
        for told, name in self.scores.items():
            if told in after and name not in own and before[told].shape == after[told].shape:
                own[name], other[name] = (_finite(answers[told]) for answers in (before, after))
        return own, other

    @property
    def note(self) -> str:
        """A sentence for the report."""
        values = ", ".join(repr(name) for name in self.scores.values())
        return (
            "The outputs are a selection: they are compared with both models selecting what the original selects, "
            f"beside what is selected by ({values}), of which all is compared."
        )


@dataclass(frozen=True)
class Alike:
    """Two models to compare, and how the second is asked.

    `selections`: what the first tells beside its outputs; None: nothing. `obeys`: whether the second is given that.
    """

    original: Model
    second: Model
    selections: Selections | None = None
    obeys: bool = False

    @cached_property
    def first(self) -> Model:
        """The original as it is asked; a copy of its graph where it tells something, and its answers may be known."""
        return self.original if self.selections is None else telling(self.original, self.selections)

    def given(self, before: Mapping[str, Array]) -> dict[str, Array]:
        """What the second is fed beside the inputs, where this is what the first answered."""
        return self.selections.given(before) if self.selections is not None and self.obeys else {}

    def compared(
        self, before: Mapping[str, Array], after: Mapping[str, Array]
    ) -> tuple[Mapping[str, Array], Mapping[str, Array]]:
        """What is compared of both answers."""
        if self.selections is None:
            return before, after
        return self.selections.compared(before, after) if self.obeys else (self.selections.own(before), after)


def asked_alike(first: Model, second: Model, selections: Selections | None) -> Alike:
    """`selections`: those of the first model; None: it has none."""
    if selections is None:
        return Alike(first, second)
    asked = obeying(second, selections)
    return Alike(first, asked or second, selections, asked is not None)


def told_names(model: Model) -> list[str]:
    """Of a telling or an obeying model, the outputs that are not the model's own."""
    return [name for value in model.graph.outputs if (name := value.name or "").startswith((_CHOSEN, _SCORES))]


def is_told(name: str) -> bool:
    """Whether an output of this name tells what a model selects."""
    return name.startswith(_CHOSEN)


def selections_of(model: Model, feeds: Iterable[Feeds]) -> Selections | None:
    """None: no output is a selection, or it cannot be told. `feeds`: of which the first `TRIED` are looked at.

    Raises ModelNotRunnableError, UnsupportedOperatorError where the model does not run.
    """
    # Places of integers, such as those that a mask leaves, are decided elsewhere; that needs no run of the model.
    nodes = [node for node in _selecting(model) if any(_may_be_float(value) for _, value in _scores_of(node))]
    if not nodes or model.opset < _GATHER_ELEMENTS_SINCE:
        return None
    tried = list(islice(feeds, TRIED))
    with session_of(_telling(model, nodes)) as session:
        told = [run(session, feed) for feed in tried]
    found = _described(model, nodes, told)
    if not found.chosen:
        return None
    # What a loop gives cannot be told to come in reverse; around a NonMaxSuppression it is a selection.
    in_a_loop = any(node.op_type in _AROUND for node in nodes)
    return found if in_a_loop or _follows(model, found, tried, told) else None


def telling(model: Model, selections: Selections) -> Model:
    """A copy that answers what `selections` names beside its outputs."""
    return _telling(model, [node for node in _selecting(model) if _names(node, selections)])


def obeying(model: Model, selections: Selections) -> Model | None:
    """A copy that is given the indices that `selections` names; None: it does not select in all of these places, or by
    other values."""
    nodes = [node for node in _selecting(model) if _names(node, selections)]
    present = {selections.same[name] for node in nodes for name, _ in _told_by(node)}
    scored = {name for node in nodes for name, _ in _scores_of(node)}
    if present != set(selections.same.values()) or not scored >= set(selections.scores):
        return None
    copy = _telling(model, nodes, scores_alone=True)
    editor = Editor(copy)
    for node in [node for node in _selecting(copy) if _names(node, selections)]:
        for name, value in _told_by(node):
            dtype, rank = selections.chosen[name]
            fed = onnx_ir.Value(name=name, type=onnx_ir.TensorType(dtype), shape=onnx_ir.Shape([None] * rank))
            copy.graph.inputs.append(fed)
            if node.op_type == "TopK":
                axis = int_attribute(node, "axis", -1)
                best = editor.make("GatherElements", [node.inputs[0], fed], "told", attributes={"axis": axis})
                _put(editor, best, node, node.outputs[0])
            _put(editor, editor.make("Identity", [fed], "told"), node, value)
        copy.graph.remove(node, safe=True)
    return copy


def _put(editor: Editor, new: onnx_ir.Node, node: onnx_ir.Node, value: onnx_ir.Value) -> None:
    """`new` makes what was `value`, of `node`."""
    editor.ir.graph.insert_before(node, new)
    if value.uses() or value.is_graph_output():
        editor.hand_over(value, new.outputs[0])


def _selecting(model: Model) -> Iterator[onnx_ir.Node]:
    for node in model.graph:
        if is_op(node, "TopK", "NonMaxSuppression", "NonZero") or (is_op(node, *_AROUND) and _only_selects(node)):
            yield node


def _only_selects(node: onnx_ir.Node) -> bool:
    inner = [one for graph in subgraphs(node).values() for one in graph.all_nodes()]
    return any(is_op(one, "NonMaxSuppression") for one in inner) and not any(one.op_type in _WEIGHTED for one in inner)


def _told_by(node: onnx_ir.Node) -> list[tuple[str, onnx_ir.Value]]:
    """What the node selects: of TopK the indices, which may have no name of their own."""
    if node.op_type == "TopK":
        return [(f"{_CHOSEN}{node.outputs[0].name or node.outputs[1].name}", node.outputs[1])]
    return [(f"{_CHOSEN}{value.name}", value) for value in node.outputs if value.name]


def _names(node: onnx_ir.Node, selections: Selections) -> bool:
    return all(name in selections.chosen for name, _ in _told_by(node))


def _may_be_float(value: onnx_ir.Value) -> bool:
    return value.dtype is None or value.dtype.is_floating_point()


def _scores_of(node: onnx_ir.Node) -> list[tuple[str, onnx_ir.Value]]:
    """What the node selects by, as far as it is computed in the main graph."""
    if node.op_type == "NonZero":
        values = list(_compared(node))
    elif node.op_type in _AROUND:
        values = list(read_values(node))
    else:
        values = [value for index in (0, 1) if (value := input_of(node, index)) is not None]
        values = values[:1] if node.op_type == "TopK" else values[1:]
    computed = [one for one in values if one.name and (maker := one.producer()) and maker.graph is node.graph]
    whole = dict.fromkeys(one for value in computed if not is_constant(value) for one in _whole(value))
    start = f"{_SCORES}{_told_by(node)[0][0].removeprefix(_CHOSEN)}"
    return [(f"{start}.{number}", one) for number, one in enumerate(whole)]


def _whole(value: onnx_ir.Value) -> list[onnx_ir.Value]:
    """What the scores were gathered from that another selection has left; themselves, where that is nothing."""
    maker, found = value.producer(), value
    while maker is not None and is_op(maker, *_MOVING, *_GATHERING) and maker.inputs[0] is not None:
        if is_op(maker, "Concat"):
            parts = [_whole(one) for one in maker.inputs if one is not None]
            gathered = all(part != [one] for part, one in zip(parts, maker.inputs, strict=True))
            return [one for part in parts for one in part] if gathered else [found]
        found = maker.inputs[0] if is_op(maker, *_GATHERING) else found
        maker = maker.inputs[0].producer()
    return [found]


def _compared(node: onnx_ir.Node) -> Iterator[onnx_ir.Value]:
    """What is compared with a threshold where a NonZero finds what is above it; or what it looks at as it is."""
    frontier = [value for value in node.inputs if value is not None]
    seen: set[onnx_ir.Value] = set()
    while frontier:
        value = frontier.pop(0)
        maker = value.producer()
        if value in seen or maker is None:
            continue
        seen.add(value)
        if is_op(maker, *_CONDITIONS):
            frontier += [one for one in maker.inputs if one is not None]
        elif is_op(maker, *_THRESHOLDS):
            yield from (one for one in maker.inputs if one is not None)
        elif not is_constant(value):
            yield value


def _telling(model: Model, nodes: Iterable[onnx_ir.Node], *, scores_alone: bool = False) -> Model:
    """A copy that answers what `nodes` of the model select and what from; or what from alone."""
    wanted = {node.outputs[0].name or node.outputs[1].name for node in nodes}
    copy = model.clone()
    editor = Editor(copy)
    for node in list(_selecting(copy)):
        if (node.outputs[0].name or node.outputs[1].name) not in wanted:
            continue
        told = [*([] if scores_alone else _told_by(node)), *_scores_of(node)]
        for name, value in told:
            value.name = value.name or editor.name("told")
            same = editor.make("Identity", [value], "told")
            same.outputs[0].name, same.outputs[0].type = name, value.type
            copy.graph.append(same)
            copy.graph.outputs.append(same.outputs[0])
    return copy


def _described(model: Model, nodes: Iterable[onnx_ir.Node], told: Sequence[Mapping[str, Array]]) -> Selections:
    """Of the nodes, those that select by floats."""
    chosen: dict[str, tuple[onnx_ir.DataType, int]] = {}
    scores: dict[str, str] = {}
    # Thresholds beside other selections are of sizes of boxes, or of scores that these see as well.
    nodes = sorted(nodes, key=lambda node: node.op_type == "NonZero")
    for node in nodes:
        floats = {name: value.name or "" for name, value in _scores_of(node) if told[0][name].dtype.kind == "f"}
        if not floats and node.op_type in ("TopK", "NonZero"):
            continue
        for name, _ in _told_by(node):
            chosen[name] = (onnx_ir.DataType.from_numpy(told[0][name].dtype), told[0][name].ndim)
        if node.op_type != "NonZero" or nodes[0].op_type == "NonZero":
            scores |= {name: value for name, value in floats.items() if value not in scores.values()}
    same = {
        name: next(other for other in chosen if all(np.array_equal(one[name], one[other]) for one in told))
        for name in chosen
    }
    return Selections(chosen, same, scores, tuple(value.name or "" for value in model.graph.outputs))


def _follows(model: Model, found: Selections, feeds: Iterable[Feeds], told: Iterable[Mapping[str, Array]]) -> bool:
    """Whether the outputs are others where the selections come in reverse. Where there is never more than one thing to
    reverse, NonMaxSuppression alone says that they are."""
    axes = {name: _reversed_axis(node) for node in _selecting(model) for name, _ in _told_by(node)}
    copy, few = obeying(model, found), True
    if copy is None:
        return False
    with session_of(copy) as session:
        for feed, before in zip(feeds, told, strict=True):
            given = {name: np.flip(array, axes[name]) for name, array in found.given(before).items()}
            if all(array.shape[axes[name]] < 2 for name, array in given.items()):
                continue
            few = False
            try:
                after = run(session, {**feed, **given})
            except (ModelNotRunnableError, UnsupportedOperatorError):
                return False
            if any(why_different(before[name], after[name]) is not None for name in found.outputs):
                return True
    return few and any(is_op(node, "NonMaxSuppression") for node in model.graph)


def _reversed_axis(node: onnx_ir.Node) -> int:
    return int_attribute(node, "axis", -1) if node.op_type == "TopK" else int(node.op_type == "NonZero")


def _finite(array: Array) -> Array:
    return np.where(np.isfinite(array), array, 0).astype(array.dtype)
