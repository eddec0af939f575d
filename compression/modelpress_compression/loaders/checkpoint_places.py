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
from modelpress_compression.loaders.checkpoint_file import array_weights, module_weights
from modelpress_compression.loaders.formats.refusals import refused
from modelpress_compression.loaders.weight_names import Weights, common_prefix, without_wrapper_parts, without_wrappers

_MAX_DEPTH = 6
_MAX_PLACES = 100
_MAX_TENSORS = 1_000_000
_LISTED = 8
# Parts of a checkpoint that hold tensors of the training, not of the network.
_OF_TRAINING = {"optim", "optimizer", "optimizers", "scheduler", "schedulers", "scaler", "rng", "amp", "opt"}
# Averages of the weights; the teacher of self-distillation (DINO, mean teacher) is one, too.
_AVERAGED = {"ema", "averaged", "swa", "polyak", "teacher"}
# Where Lightning puts the weights as trained, once it has put the averaged ones under `state_dict`.
_AS_TRAINED = "current_model_state"
_UNNAMED = "shadow_params"
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


def is_as_trained(key: str) -> bool:
    """Whether a key says that the same weights lie elsewhere, averaged."""
    return key.partition(".")[0] == _AS_TRAINED


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


def averages(checkpoint: Any) -> tuple[str, list[torch.Tensor]] | None:
    """Averages without names, one for each trained parameter in the network's order, as torch_ema and what descends
    from score_sde save them; with the key that they lie under."""
    for key, part in [("", checkpoint), *_items(checkpoint)]:
        listed = part.get(_UNNAMED) if isinstance(part, Mapping) else None
        if isinstance(listed, list) and listed and all(isinstance(value, torch.Tensor) for value in listed):
            return f"{key}.{_UNNAMED}".lstrip("."), listed
    return None


def select(found: list[Place], key: str) -> Place:
    """What the user named: a key, a dotted path of keys, or what the names of some weights begin with, where need be
    behind what a wrapper put before it (`module.encoder_q` as `encoder_q`).

    Raises InvalidInputsError, which lists what there is.
    """
    for place in found:
        if place.key == key:
            return place
    for place in found:
        start = without_wrapper_parts(key.removeprefix(f"{place.key}.")) + "."
        inside = {before for name in place.weights if (before := _before(name, start)) is not None}
        for before in ("", *sorted(inside)) if len(inside) == 1 else ("",):
            begun = _begun(place.weights, before + start)
            if begun:
                return Place(key, begun)
    raise InvalidInputsError(f"--state-dict-key {key!r} is not in the file. It holds {offered(found)}.")


def _before(name: str, start: str) -> str | None:
    """What stands before `start` in a name, if it is there as whole parts."""
    at = f".{name}".find(f".{start}")
    return name[:at] if at >= 0 else None


def _begun(weights: Weights, start: str) -> Weights:
    return {name[len(start) :]: value for name, value in weights.items() if name.startswith(start)}


def offered(found: list[Place]) -> str:
    """What --state-dict-key can name, with how many parameters it has."""
    named = [place for place in found if place.key] or found
    if len(named) == 1:
        named = [*(place for place in named if place.key), *_branches(named[0])]
    more = f" and {len(named) - _LISTED} more" if len(named) > _LISTED else ""
    return f"{', '.join(map(str, named[:_LISTED]))}{more}"


def _branches(place: Place) -> list[Place]:
    """What the names of flat weights begin with, behind what all of them begin with."""
    common, weights = common_prefix(place.weights), place.weights
    while common:
        place = Place(f"{place.key}.{common[:-1]}".lstrip("."), _begun(weights, common))
        common, weights = common_prefix(place.weights), place.weights
    branches: dict[str, dict[str, torch.Tensor]] = {}
    for name, value in weights.items():
        head, dot, rest = name.partition(".")
        branches.setdefault(head if dot else "", {})[rest or name] = value
    return [Place(".".join(part for part in (place.key, key) if part), inner) for key, inner in branches.items()]


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
        items = [(name, value) for name, value in found.items() if isinstance(name, str)]
        # Beside anything else, arrays are statistics, random states or results.
        arrays = [(name, array_weights(value)) for name, value in items]
        return arrays if arrays and all(value is not None for _, value in arrays) else items
    if isinstance(found, list | tuple):
        return [(str(index), value) for index, value in enumerate(found[:_MAX_PLACES]) if isinstance(value, Mapping)]
    return []


def _amount(count: int) -> str:
    for unit, letter in ((10**9, "G"), (10**6, "M"), (10**3, "k")):
        if count >= unit:
            return f"{count / unit:.3g} {letter}"
    return str(count)
