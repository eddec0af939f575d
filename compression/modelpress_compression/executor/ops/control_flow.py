"""If, Loop, Scan and SequenceMap: subgraphs run as plans, with the outer values that they capture."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from modelpress_compression.executor.plan import ExecutionPlan
from modelpress_compression.executor.registry import Function, operator
from modelpress_compression.executor.site import Site


def _result(values: list[Any]) -> Any:
    return values[0] if len(values) == 1 else tuple(values)


@operator("If")
def if_(site: Site) -> Function:
    """Only the branch that is taken runs."""
    then_branch, else_branch = site.subplans["then_branch"], site.subplans["else_branch"]

    def run(condition: Tensor, *captured: Any) -> Any:
        return _result((then_branch if bool(condition) else else_branch).run(captured))

    return run


@operator("Loop")
def loop(site: Site) -> Function:
    """Body: (iteration, condition, carried...) -> (condition, carried..., scanned...)."""
    body, count = site.subplans["body"], len(site.node.inputs)

    def run(*inputs: Any) -> Any:
        limit, condition, *carried = inputs[:count]
        captured = inputs[count:]
        most = None if limit is None else int(limit)
        going = condition is None or bool(condition)
        scanned: list[list[Any]] = [[] for _ in range(len(body.outputs) - 1 - len(carried))]
        iteration = 0
        while going and (most is None or iteration < most):
            step = torch.tensor(iteration)
            go_on, *values = body.run((step, torch.tensor(True), *carried, *captured))
            carried, pieces = values[: len(carried)], values[len(carried) :]
            for collected, piece in zip(scanned, pieces, strict=True):
                collected.append(piece)
            going, iteration = bool(go_on), iteration + 1
        empty = [torch.zeros(0) if not collected else torch.stack(collected) for collected in scanned]
        return _result([*carried, *empty])

    return run


@operator("Scan", since=9)
def scan(site: Site) -> Function:
    """Body: (state..., slices...) -> (state..., slices...)."""
    body, count, n_scanned = site.subplans["body"], len(site.node.inputs), site.integer("num_scan_inputs", 1)
    n_states = count - n_scanned
    n_outputs = len(body.outputs) - n_states
    axes = site.ints("scan_input_axes", (0,) * n_scanned) or (0,) * n_scanned
    backwards = site.ints("scan_input_directions", (0,) * n_scanned) or (0,) * n_scanned
    out_axes = site.ints("scan_output_axes", (0,) * n_outputs) or (0,) * n_outputs
    out_backwards = site.ints("scan_output_directions", (0,) * n_outputs) or (0,) * n_outputs

    def run(*inputs: Any) -> Any:
        state, sequences, captured = list(inputs[:n_states]), inputs[n_states:count], inputs[count:]
        length = sequences[0].shape[axes[0]]
        collected: list[list[Tensor]] = [[] for _ in range(n_outputs)]
        for step in range(length):
            slices = [
                sequence.select(axis, length - 1 - step if back else step)
                for sequence, axis, back in zip(sequences, axes, backwards, strict=True)
            ]
            values = body.run((*state, *slices, *captured))
            state = values[:n_states]
            for kept, value in zip(collected, values[n_states:], strict=True):
                kept.append(value)
        stacked = [
            torch.stack(kept[::-1] if back else kept, axis)
            for kept, axis, back in zip(collected, out_axes, out_backwards, strict=True)
        ]
        return _result([*state, *stacked])

    return run


@operator("SequenceMap")
def sequence_map(site: Site) -> Function:
    """The body once for each element; inputs that are no sequences are the same for all."""
    body, count = site.subplans["body"], len(site.node.inputs)

    def run(*inputs: Any) -> Any:
        first, others, captured = inputs[0], inputs[1:count], inputs[count:]
        rows = [_mapped(body, index, element, others, captured) for index, element in enumerate(first)]
        return _result([[row[output] for row in rows] for output in range(len(body.outputs))])

    return run


def _mapped(
    body: ExecutionPlan, index: int, element: Any, others: tuple[Any, ...], captured: tuple[Any, ...]
) -> list[Any]:
    rest = [other[index] if isinstance(other, list) else other for other in others]
    return body.run((element, *rest, *captured))
