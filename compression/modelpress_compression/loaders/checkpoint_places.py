"""The places in a checkpoint where weights lie: `state_dict`, `params_ema`, `models.generator`, ...

Training scripts put the weights where they like, often twice: as trained, and averaged over the training (EMA).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from modelpress_compression.errors import InvalidInputsError
from modelpress_compression.loaders.checkpoint_file import module_weights
from modelpress_compression.loaders.formats.refusals import refused
from modelpress_compression.loaders.weight_names import Weights, without_wrapper_parts, without_wrappers

_MAX_DEPTH = 6
_MAX_PLACES = 100
_MAX_TENSORS = 1_000_000
_LISTED = 8
# Parts of a checkpoint that hold tensors of the training, not of the network.
_OF_TRAINING = {"optim", "optimizer", "optimizers", "scheduler", "schedulers", "scaler", "rng", "amp", "opt"}
# Averages of the weights; the teacher of self-distillation (DINO, mean teacher) is one, too.
_AVERAGED = {"ema", "averaged", "swa", "polyak", "teacher"}
_WORDS = re.compile(r"[A-Za-z][a-z]*")


@dataclass(frozen=True)
class Place:
    """Weights by name. `key`: dotted path within the file, "" for the file itself."""

    key: str
    weights: Weights

    @property
    def averaged(self) -> bool:
        """Whether its name says that these are averages (EMA) of the weights."""
        return is_averaged(self.key)

    def __str__(self) -> str:
        count = sum(value.numel() for value in self.weights.values())
        return f"{self.key or 'the file itself'} ({_amount(count)} parameters)"


def is_averaged(key: str) -> bool:
    """Whether a key or prefix names averages of the weights: `params_ema`, `G_ema`, `teacher.backbone`."""
    return bool(_AVERAGED & {word.lower() for word in _WORDS.findall(key)})


def places(checkpoint: Any) -> list[Place]:
    """Every place that holds tensors by name, the outermost first. Raises UnsupportedFormatError where none does."""
    found = []
    for place in _places(checkpoint, "", 0):
        found.append(place)
        if len(found) >= _MAX_PLACES:
            break
    if not found:
        what = type(checkpoint).__name__
        if isinstance(checkpoint, Mapping):
            what = ", ".join(str(key)[:60] for key in list(checkpoint)[:_LISTED]) or "nothing"
        raise refused("NO_WEIGHTS", listed=what)
    return found


def select(found: list[Place], key: str) -> Place:
    """What the user named: a key, a dotted path of keys, or what the names of some weights begin with.

    Raises InvalidInputsError, which lists what there is.
    """
    for place in found:
        if place.key == key:
            return place
    for place in found:
        start = without_wrapper_parts(key.removeprefix(f"{place.key}.")) + "."
        begun = {name[len(start) :]: value for name, value in place.weights.items() if name.startswith(start)}
        if begun:
            return Place(key, begun)
    raise InvalidInputsError(f"--state-dict-key {key!r} is not in the file. It holds {offered(found)}.")


def offered(found: list[Place]) -> str:
    """What --state-dict-key can name, with how many parameters it has."""
    if len(found) == 1 and not found[0].key:
        found = _branches(found[0])
    named = [place for place in found if place.key] or found
    more = f" and {len(named) - _LISTED} more" if len(named) > _LISTED else ""
    return f"{', '.join(map(str, named[:_LISTED]))}{more}"


def _branches(place: Place) -> list[Place]:
    """What the names of flat weights begin with."""
    branches: dict[str, dict[str, torch.Tensor]] = {}
    for name, value in place.weights.items():
        head, dot, rest = name.partition(".")
        branches.setdefault(head if dot else "", {})[rest or name] = value
    return [Place(key, weights) for key, weights in branches.items()]


def _places(found: Any, key: str, depth: int) -> Iterator[Place]:
    weights = module_weights(found)
    if weights is not None:
        if weights:
            yield Place(key, without_wrappers(weights))
        return
    items = _items(found)
    own = {name: value for name, value in items if isinstance(value, torch.Tensor)}
    if own:
        yield Place(key, without_wrappers(own))
    if depth >= _MAX_DEPTH:
        return
    parts: dict[str, torch.Tensor] = {}
    for name, value in items:
        if not _OF_TRAINING & {word.lower() for word in _WORDS.findall(name)}:
            for inner in _places(value, f"{key}.{name}" if key else name, depth + 1):
                yield inner
                if not own and len(parts) < _MAX_TENSORS and "." not in inner.key.removeprefix(f"{key}."):
                    parts |= {f"{name}.{part}": tensor for part, tensor in inner.weights.items()}
    if parts and not depth:
        # {"encoder": ..., "decoder": ...}: one network, saved in parts.
        yield Place("", parts)


def _items(found: Any) -> list[tuple[str, Any]]:
    if isinstance(found, Mapping):
        return [(name, value) for name, value in found.items() if isinstance(name, str)]
    if isinstance(found, list | tuple):
        return [(str(index), value) for index, value in enumerate(found[:_MAX_PLACES]) if isinstance(value, Mapping)]
    return []


def _amount(count: int) -> str:
    for unit, letter in ((10**9, "G"), (10**6, "M"), (10**3, "k")):
        if count >= unit:
            return f"{count / unit:.3g} {letter}"
    return str(count)
