"""From a file's names of weights to a network's: prefixes of wrappers, and how one thing was called at another time."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping

import torch

Weights = Mapping[str, torch.Tensor]

# What torch.compile, FSDP, activation checkpointing and Lightning's strategies put into names, anywhere.
_WRAPPERS = frozenset({"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_forward_module"})
_PROBES = 12  # names of the network that are looked for in the file, to find what stands before them
_MAX_PREFIXES = 24
# The two halves of a weight's parametrization, by their names in torch.nn.utils and torch.nn.utils.parametrizations.
_PARAMETRIZED = (
    ("weight_g", "parametrizations.weight.original0"),
    ("weight_v", "parametrizations.weight.original1"),
    ("weight_orig", "parametrizations.weight.original"),
    ("weight_u", "parametrizations.weight.0._u"),
    ("weight_v", "parametrizations.weight.0._v"),
)
# TensorFlow's names, under which the first BERT files were written.
_LAST = {"gamma": "weight", "beta": "bias"}


def without_wrappers(weights: Weights) -> Weights:
    """The weights without the parts of names that wrappers put in."""
    return {without_wrapper_parts(name): value for name, value in weights.items()}


def without_wrapper_parts(name: str) -> str:
    """One name, or the beginning of one."""
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)


def prefixes(weights: Weights, wanted: Collection[str]) -> list[str]:
    """What may stand before the network's names in the file, most often found first; "" is always among them.

    A name of the network is looked for as the end of names in the file.
    """
    counts: Counter[str] = Counter()
    # Long names first: `weight` alone ends every name.
    probes = sorted(wanted, key=lambda name: (-name.count("."), name))
    for probe in probes[:: max(1, len(probes) // _PROBES)][:_PROBES]:
        for form in _forms(probe):
            counts.update(name[: -len(form)] for name in weights if name.endswith(f".{form}"))
    found = [prefix for prefix, _ in counts.most_common(_MAX_PREFIXES)]
    return ["", *found]


def common_prefix(wanted: Collection[str]) -> str:
    """What all of the network's names begin with, up to a dot: `net.` of a module that wraps another."""
    heads = {name.partition(".")[0] for name in wanted}
    return f"{heads.pop()}." if len(heads) == 1 and all("." in name for name in wanted) else ""


def renamed(weights: Weights, wanted: Weights) -> Weights:
    """The weights by the network's own names where they are called otherwise; merged where they were taken apart."""
    found = {name: value for name, value in weights.items() if name in wanted}
    for name, value in weights.items():
        if name not in found:
            new = next((form for form in _forms(name) if form in wanted and form not in weights), name)
            found.setdefault(new, value)
    for name, value, parts in _merged(found, wanted):
        found = {key: old for key, old in found.items() if key not in parts}
        found[name] = value
    return found


def _forms(name: str) -> Iterator[str]:
    """A name as it may be called elsewhere; itself first."""
    yield name
    stem, _, last = name.rpartition(".")
    dot = f"{stem}." if stem else ""
    if last in _LAST:
        yield f"{dot}{_LAST[last]}"
    for old, new in _PARAMETRIZED:
        if last == old:
            yield f"{dot}{new}"
        if name == new or name.endswith(f".{new}"):
            yield f"{name.removesuffix(new)}{old}"
    parts = name.split(".")
    if "module" in parts[1:]:
        yield ".".join(part for part in parts if part != "module")


def _merged(weights: Weights, wanted: Weights) -> Iterator[tuple[str, torch.Tensor, set[str]]]:
    """Weights that the network has whole and the file in parts: name, value, and the names of the parts."""
    for name, target in wanted.items():
        stem, dot, last = name.rpartition(".")
        if name in weights or last not in _LAST.values():
            continue
        for merge, kinds in _MERGES:
            for parts in kinds:
                names = [f"{stem}{dot}{part.format(last)}" for part in parts]
                if all(part in weights for part in names):
                    value = merge(*(weights[part].float() for part in names))
                    if value is not None and value.shape == target.shape:
                        yield name, value, set(names)


def _weight_norm(g: torch.Tensor, v: torch.Tensor) -> torch.Tensor | None:
    """w = g * v / |v|, the norm over the axes that `g` has not (Salimans and Kingma, 2016)."""
    axes = [axis for axis in range(v.ndim) if g.ndim != v.ndim or g.shape[axis] == 1]
    return v * (g / torch.linalg.vector_norm(v, dim=axes, keepdim=True)) if axes else None


def _spectral_norm(weight: torch.Tensor, u: torch.Tensor, v: torch.Tensor) -> torch.Tensor | None:
    """w / (u . W v), with W as a matrix whose rows are the axis that `u` runs over (Miyato et al., 2018)."""
    for axis in (0, 1):
        if axis < weight.ndim and weight.shape[axis] == u.numel() and weight.numel() == u.numel() * v.numel():
            rows = weight.movedim(axis, 0).reshape(u.numel(), -1)
            return weight / torch.dot(u, rows @ v)
    return None


def _masked(weight: torch.Tensor, mask: torch.Tensor) -> torch.Tensor | None:
    """What torch.nn.utils.prune computes with, until `prune.remove`."""
    return weight * mask if weight.shape == mask.shape else None


# The parts with `{}` are of weights and biases alike.
_MERGES: tuple[tuple[Callable[..., torch.Tensor | None], tuple[tuple[str, ...], ...]], ...] = (
    (
        _weight_norm,
        (("weight_g", "weight_v"), ("parametrizations.weight.original0", "parametrizations.weight.original1")),
    ),
    (
        _spectral_norm,
        (
            ("weight_orig", "weight_u", "weight_v"),
            ("parametrizations.weight.original", "parametrizations.weight.0._u", "parametrizations.weight.0._v"),
        ),
    ),
    (_masked, (("{}_orig", "{}_mask"),)),
)
