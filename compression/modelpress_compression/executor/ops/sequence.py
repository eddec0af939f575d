"""Sequences, which are lists, and optional values, which may be None."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from modelpress_compression.executor.registry import Function, operator, stateless
from modelpress_compression.executor.site import Site


@operator("SequenceConstruct")
def construct(site: Site) -> Function:
    return lambda *values: list(values)


@operator("SequenceEmpty")
def empty(site: Site) -> Function:
    return lambda: []


stateless(lambda sequence, position: sequence[int(position)], "SequenceAt")
stateless(lambda sequence: torch.tensor(len(sequence)), "SequenceLength")


def insert(sequence: list[Any], value: Any, position: Tensor | None = None) -> list[Any]:
    """A copy with the value before `position`, or at the end."""
    result = list(sequence)
    result.insert(len(result) if position is None else int(position), value)
    return result


def erase(sequence: list[Any], position: Tensor | None = None) -> list[Any]:
    """A copy without the element at `position`, or without the last."""
    result = list(sequence)
    del result[-1 if position is None else int(position)]
    return result


stateless(insert, "SequenceInsert")
stateless(erase, "SequenceErase")


@operator("ConcatFromSequence")
def concat_from_sequence(site: Site) -> Function:
    axis, new = site.integer("axis", 0), site.flag("new_axis")
    return lambda sequence: torch.stack(sequence, axis) if new else torch.cat(sequence, axis)


@operator("SplitToSequence")
def split_to_sequence(site: Site) -> Function:
    """Into pieces of a size, of given sizes, or into single elements, then without the axis if `keepdims` is 0."""
    axis, keep = site.integer("axis", 0), site.flag("keepdims", True)

    def run(x: Tensor, sizes: Tensor | None = None) -> list[Tensor]:
        if sizes is None:
            return list(torch.split(x, 1, axis)) if keep else list(x.unbind(axis))
        return list(torch.split(x, int(sizes) if sizes.dim() == 0 else sizes.tolist(), axis))

    return run


@operator("Optional")
def optional(site: Site) -> Function:
    return lambda value=None: value


@operator("OptionalGetElement")
def optional_get(site: Site) -> Function:
    return lambda value: value


@operator("OptionalHasElement")
def optional_has(site: Site) -> Function:
    return lambda value=None: torch.tensor(value is not None)
