"""Inputs of a torch.export program: names, types, and names for its dynamic dimensions.

torch renames dynamic dimensions when it saves (`batch` becomes `s77`), and the archive does not keep the user's words.
Dimensions are the user's where an --input names them; otherwise the first axis of the first input is `batch`, and
others are called after their axis.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import torch

from modelpress_compression.errors import InvalidInputsError
from modelpress_compression.specs import DTYPES, TensorSpec

_SYMBOL = re.compile(r"[su]\d+")


def program_specs(program: torch.export.ExportedProgram) -> tuple[TensorSpec, ...]:
    """The user's inputs in order. Raises InvalidInputsError for inputs that are no tensors."""
    names = program.graph_signature.user_inputs
    nodes = {node.name: node for node in program.graph.nodes if node.op == "placeholder"}
    values: list[tuple[str, Any]] = []
    for name in names:
        node = nodes.get(name) if isinstance(name, str) else None
        value = node.meta.get("val") if node is not None else None
        if not isinstance(value, torch.Tensor):
            raise InvalidInputsError(
                f"The program's input {name!r} is {type(value).__name__}, not a tensor; export it with tensors alone."
            )
        values.append((str(name), value))
    words = _words(values)
    return tuple(
        TensorSpec(name, _dtype(name, value), tuple(words.get(str(dim), _size(dim)) for dim in value.shape))
        for name, value in values
    )


def _dtype(name: str, value: torch.Tensor) -> str:
    dtype = str(value.dtype).removeprefix("torch.")
    if dtype not in DTYPES:
        raise InvalidInputsError(f"The program's input {name!r} has the type {dtype}; use one of {', '.join(DTYPES)}.")
    return dtype


def _size(dim: Any) -> int | None:
    return dim if isinstance(dim, int) else None


def _words(values: Sequence[tuple[str, Any]]) -> dict[str, str]:
    """Each of torch's symbols -> a word; expressions such as 2*s77 have none."""
    words: dict[str, str] = {}
    for name, value in values:
        for axis, dim in enumerate(value.shape):
            symbol = str(dim)
            if isinstance(dim, int) or symbol in words:
                continue
            if not _SYMBOL.fullmatch(symbol):
                continue
            taken = words.values()
            word = "batch" if axis == 0 and "batch" not in taken else f"dim_{axis}"
            words[symbol] = word if word not in taken else f"{name}_dim_{axis}"
    return words


def match_specs(own: Sequence[TensorSpec], given: Sequence[TensorSpec]) -> tuple[TensorSpec, ...]:
    """The program's inputs with the user's words for dimensions. Raises InvalidInputsError where they contradict."""
    listed = ", ".join(map(str, own))
    by_name = {spec.name: spec for spec in given}
    if len(own) == len(given) == 1:
        by_name = {own[0].name: given[0]}
    if unknown := by_name.keys() - {spec.name for spec in own}:
        raise InvalidInputsError(f"The program has no input {', '.join(sorted(unknown))}; it has {listed}.")
    words: dict[str, int | str] = {}
    for spec in own:
        want = by_name.get(spec.name, spec)
        if want.dtype != spec.dtype or len(want.shape) != len(spec.shape):
            raise InvalidInputsError(f"Input {want} does not fit the program, which has {listed}.")
        for old, new in zip(spec.shape, want.shape, strict=True):
            if isinstance(old, int) and new not in (old, None):
                raise InvalidInputsError(
                    f"Input {want}: the program was exported with the fixed size {old} there, it has {listed}. "
                    f"Export it with dynamic_shapes to vary it."
                )
            if isinstance(old, str) and new is not None and words.setdefault(old, new) != new:
                raise InvalidInputsError(f"Input {want}: one dimension has two names; it has {listed}.")
    return tuple(
        TensorSpec(
            spec.name, spec.dtype, tuple(words.get(dim, dim) if isinstance(dim, str) else dim for dim in spec.shape)
        )
        for spec in own
    )
