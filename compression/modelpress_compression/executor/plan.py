"""A graph as a flat list of steps: the function to run, the slots that it reads and fills, and those to empty after it.

Slots are a list that every run copies from a template with the constants and parameters in place, so that a run is one
tight loop. A slot is emptied after its last reader, so that without gradients no more than the live values are held.
Subgraphs (If, Loop, Scan) are plans of their own: they take their inputs, then the outer values that they capture.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from modelpress_compression.errors import CompressionError, ModelNotRunnableError

# Slot 0 stands for an input that is left out, slot 1 takes outputs that nobody wants.
MISSING, UNWANTED = 0, 1


class ExecutionStep(NamedTuple):
    """One node: `function` takes the values of `inputs`; a tuple that it returns fills `outputs` in order."""

    function: Callable[..., Any]
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    frees: tuple[int, ...]
    label: str


@dataclass(frozen=True)
class ExecutionPlan:
    """A compiled graph. `inputs`: slots of the graph's inputs, then of the captured values.

    `frugal`: the same steps where no gradients are kept; some of them overwrite what they read.
    """

    template: list[Any]
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    steps: tuple[ExecutionStep, ...]
    frugal: tuple[ExecutionStep, ...]

    def run(self, arguments: Sequence[Any]) -> list[Any]:
        """Values of the outputs. Raises ModelNotRunnableError, naming the node, where the values do not fit."""
        slots = self.template.copy()
        for slot, value in zip(self.inputs, arguments, strict=True):
            slots[slot] = value
        steps = self.steps if torch.is_grad_enabled() else self.frugal
        label = ""
        try:
            for function, inputs, outputs, frees, label in steps:  # noqa: B007 - the handler names the last one
                result = function(*[slots[slot] for slot in inputs])
                if result.__class__ is tuple:
                    for slot, value in zip(outputs, result, strict=False):  # optional outputs may be left out
                        slots[slot] = value
                else:
                    slots[outputs[0]] = result
                for slot in frees:
                    slots[slot] = None
        except CompressionError:
            raise
        except (RuntimeError, TypeError, ValueError, IndexError, AttributeError, NotImplementedError) as error:
            raise ModelNotRunnableError(
                f"Node {label}: the values do not fit the operator: {' '.join(str(error).split())[:400]}", node=label
            ) from error
        return [slots[slot] for slot in self.outputs]


def freed_after(
    readers: Sequence[tuple[tuple[int, ...], tuple[int, ...]]], kept: frozenset[int]
) -> list[tuple[int, ...]]:
    """For each step, given as (inputs, outputs): the slots that no later step reads, without those that are `kept`."""
    last: dict[int, int] = {}
    for number, (inputs, outputs) in enumerate(readers):
        last.update(dict.fromkeys((*inputs, *outputs), number))
    result: list[list[int]] = [[] for _ in readers]
    for slot, number in last.items():
        if slot not in kept:
            result[number].append(slot)
    return [tuple(slots) for slots in result]
