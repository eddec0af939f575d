"""A checkpoint's weights into the network that they belong to: finds the place that fits, and says what was chosen."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from modelpress_compression.errors import InvalidInputsError, UnsupportedFormatError
from modelpress_compression.loaders.architecture import Architecture
from modelpress_compression.loaders.checkpoint_file import read_pickle, read_safetensors
from modelpress_compression.loaders.checkpoint_places import (
    Place,
    averages,
    is_as_trained,
    is_averaged,
    offered,
    places,
    select,
)
from modelpress_compression.loaders.formats import Format
from modelpress_compression.loaders.formats.weight_files import WeightFiles
from modelpress_compression.loaders.pretrained import AUTO, build_auto, fit_by_library
from modelpress_compression.loaders.weight_fit import Fit, advice, fits


@dataclass(frozen=True)
class Wanted:
    """What the user said about weights: see `modelpress_compression.convert.convert`."""

    architecture: str
    trust_pickle: bool = False
    state_dict_key: str | None = None
    ignore_weights: tuple[str, ...] = ()


@dataclass(frozen=True)
class Loaded:
    """A network with its weights, the files that it came from, and what a user should know of how it was done."""

    module: torch.nn.Module
    files: tuple[Path, ...]
    notes: tuple[str, ...]


def with_weights(files: WeightFiles, row: Format, wanted: Wanted) -> Loaded:
    """Builds the network and puts the weights into it. Raises CompressionError."""
    beside = files.beside if len(files.files) > 1 else ()
    if wanted.architecture == AUTO:
        module = build_auto(files.config)
        beside = tuple(dict.fromkeys((*beside, *filter(None, [files.config]))))
    else:
        module = Architecture.parse(wanted.architecture).build()
    checkpoint = _read(files, row, trusted=wanted.trust_pickle)
    module, notes = load_checkpoint(module, checkpoint, key=wanted.state_dict_key, ignored=wanted.ignore_weights)
    return Loaded(module, (*files.files, *beside), tuple(notes))


def pickled_module(path: Path) -> torch.nn.Module:
    """The module that a trusted file holds, or its training script put into a checkpoint; averaged ones go first."""
    content = read_pickle(path, trusted=True)
    if isinstance(content, torch.nn.Module):
        return content.float()
    items = content.items() if isinstance(content, Mapping) else ()
    modules = {str(key): item for key, item in items if isinstance(item, torch.nn.Module)}
    usual = [key for key in (*filter(is_averaged, modules), "model") if key in modules]
    if not modules or not (usual or len(modules) == 1):
        what = f"modules under {', '.join(modules)}" if modules else f"a {type(content).__name__}, not a module"
        raise InvalidInputsError(f"The file holds {what}; give --architecture package.module:factory.")
    return modules[(usual or [*modules])[0]].float()


def _read(files: WeightFiles, row: Format, *, trusted: bool) -> Any:
    """The checkpoint, shards put together."""
    parts = [
        read_safetensors(path) if row.name == "safetensors" else read_pickle(path, trusted=trusted)
        for path in files.files
    ]
    if len(parts) == 1:
        return parts[0]
    if not all(isinstance(part, Mapping) for part in parts):
        raise UnsupportedFormatError("A shard of the model holds no weights by name; fetch the model again.")
    return {name: value for part in parts for name, value in part.items()}


@dataclass(frozen=True)
class _Choice:
    place: Place
    fit: Fit

    @property
    def key(self) -> str:
        """What --state-dict-key would name it by."""
        return ".".join(part for part in (self.place.key, self.fit.prefix.rstrip(".")) if part)


def load_checkpoint(
    module: torch.nn.Module, checkpoint: Any, *, key: str | None = None, ignored: Sequence[str] = ()
) -> tuple[torch.nn.Module, list[str]]:
    """The network with its weights, and what a user should know about them.

    `key`: where the weights lie, as `--state-dict-key` says it; None: wherever some fit, averaged ones (EMA) first.
    `ignored`: patterns of names that are left out. Raises InvalidInputsError with what does not fit, and
    UnsupportedFormatError where there are no weights.
    """
    found = places(checkpoint)
    tried = [select(found, key)] if key else found
    choices = [_Choice(place, fit) for place in tried for fit in fits(module, place.weights, ignored)]
    fitting = [choice for choice in choices if choice.fit.fits]
    if not fitting:
        return _by_library(module, tried, choices, found, ignored)
    chosen = _choose(fitting)
    same_place = [other.fit.prefix for other in fitting if other.place is chosen.place and other is not chosen]
    notes = chosen.fit.notes(*filter(None, same_place)) + _said_of(chosen, fitting, choices)
    _put(module, chosen.fit)
    if not key and not is_averaged(chosen.key):
        notes += _put_averages(module, checkpoint, chosen.key)
    return module, notes


def _put_averages(module: torch.nn.Module, checkpoint: Any, key: str) -> list[str]:
    """Averages without names in place of the parameters, which lie under `key`; what is to be said of them."""
    found = averages(checkpoint)
    if found is None:
        return []
    where, listed = found
    trained = [value for value in module.parameters() if value.requires_grad]
    if [value.shape for value in trained] != [value.shape for value in listed]:
        return [f"Took the weights in {key or 'the file itself'!r}; those in {where!r} do not fit."]
    with torch.no_grad():
        for value, average in zip(trained, listed, strict=True):
            value.copy_(average)
    return [
        f"Took the averaged weights (EMA) in {where!r}; --state-dict-key {key} takes the others "
        "(in Python: state_dict_key=)."
    ]


def _choose(fitting: Sequence[_Choice]) -> _Choice:
    """The one that fits; of several that differ, the averaged one. Raises InvalidInputsError where that leaves two."""
    distinct: list[_Choice] = []
    for choice in fitting:
        if not any(_equal(choice.fit, other.fit) for other in distinct):
            distinct.append(choice)
    averaged = [choice for choice in distinct if is_averaged(choice.key)]
    left = averaged or [choice for choice in distinct if not is_as_trained(choice.key)] or distinct
    if len(left) > 1:
        names = ", ".join(choice.key or "the file itself" for choice in left[:8])
        raise InvalidInputsError(
            f"The file holds {len(left)} different sets of weights that fit: {names}. Say which one with "
            f"--state-dict-key {left[0].key or left[-1].key} (in Python: state_dict_key=)."
        )
    return left[0]


def _equal(one: Fit, other: Fit) -> bool:
    return one.weights.keys() == other.weights.keys() and all(
        value is other.weights[name] or torch.equal(value, other.weights[name]) for name, value in one.weights.items()
    )


def _said_of(chosen: _Choice, fitting: Sequence[_Choice], choices: Sequence[_Choice]) -> list[str]:
    """Which of several sets was taken, and how to get the other."""
    others = [choice for choice in fitting if not _equal(choice.fit, chosen.fit)]
    if others:
        return [
            f"Took the averaged weights (EMA) in {chosen.key!r}; --state-dict-key {others[0].key} takes the others "
            "(in Python: state_dict_key=)."
        ]
    unfit = next((choice for choice in choices if is_averaged(choice.place.key) and not choice.fit.fits), None)
    if unfit and not any(is_averaged(choice.key) for choice in fitting):
        return [f"Took the weights in {chosen.key or 'the file itself'!r}; those in {unfit.place.key!r} do not fit."]
    return []


def _by_library(
    module: torch.nn.Module,
    tried: Sequence[Place],
    choices: Sequence[_Choice],
    found: list[Place],
    ignored: Sequence[str],
) -> tuple[torch.nn.Module, list[str]]:
    """By the loader of the library that the network comes from, which knows its own names; else the error."""
    best = max(choices, key=lambda choice: (choice.fit.matched, -len(choice.fit.missing)))
    place = max(tried, key=lambda item: (item.averaged, len(item.weights)))
    loaded = fit_by_library(module, place.weights, ignored)
    if loaded is not None and loaded.fit.fits:
        return loaded.module, loaded.fit.notes()
    if loaded is not None and loaded.fit.matched > best.fit.matched:
        best = _Choice(place, loaded.fit)
    where = f" in {best.key!r}" if best.key else ""
    others = f" The file holds {offered(found)}; --state-dict-key names one." if len(found) > 1 else ""
    raise InvalidInputsError(
        f"The weights{where} do not fit {type(module).__name__}: {best.fit.misfits()}. {advice(best.fit)}{others}"
    )


def _put(module: torch.nn.Module, fit: Fit) -> None:
    try:
        module.load_state_dict(fit.weights, strict=False)
    except RuntimeError as error:
        raise InvalidInputsError(
            f"The weights do not fit {type(module).__name__}: {' '.join(str(error).split())[:500]}."
        ) from error
