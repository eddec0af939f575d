"""Weights from a checkpoint into a module, with the usual wrappings of checkpoints taken off."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch

from modelpress_compression.errors import InvalidInputsError, UnsupportedFormatError

# Where training scripts put the weights within a checkpoint, and what wrappers put before the names.
_NESTS = ("state_dict", "model_state_dict", "model_state", "model", "net", "network", "module", "params", "weights")
_PREFIXES = ("module.", "_orig_mod.", "model.", "net.", "network.")
_LISTED = 5

Weights = Mapping[str, torch.Tensor]


def find_weights(checkpoint: Any) -> Weights:
    """The mapping of names to tensors in a checkpoint. Raises UnsupportedFormatError."""
    found = checkpoint
    for _ in range(3):
        if _is_weights(found):
            weights: Weights = found
            return weights
        if not isinstance(found, Mapping):
            break
        inner = next((found[name] for name in _NESTS if isinstance(found.get(name), Mapping)), None)
        if inner is None:
            break
        found = inner
    what = ", ".join(sorted(map(str, found))[:_LISTED]) if isinstance(found, Mapping) else type(found).__name__
    raise UnsupportedFormatError(
        f"The file holds no state dict: found {what}. Save it with torch.save(model.state_dict(), PATH)."
    )


def _is_weights(found: Any) -> bool:
    return (
        isinstance(found, Mapping)
        and any(isinstance(value, torch.Tensor) for value in found.values())
        and all(isinstance(key, str) for key in found)
    )


def load_weights(module: torch.nn.Module, weights: Weights) -> None:
    """`load_state_dict(strict=True)` under the names that fit best. Raises InvalidInputsError that lists misfits."""
    wanted = module.state_dict()
    tensors = {name: value for name, value in weights.items() if isinstance(value, torch.Tensor)}
    best = max(_variants(tensors), key=lambda variant: len(variant.keys() & wanted.keys()))
    missing = [name for name in wanted if name not in best]
    unexpected = [name for name in best if name not in wanted]
    shapes = [
        f"{name} is {list(best[name].shape)} in the file and {list(value.shape)} in the module"
        for name, value in wanted.items()
        if name in best and isinstance(value, torch.Tensor) and best[name].shape != value.shape
    ]
    if missing or unexpected or shapes:
        parts = [_listed("missing in the file", missing), _listed("not in the module", unexpected)]
        parts.append(_listed("of another shape", shapes))
        raise InvalidInputsError(
            f"The weights do not fit {type(module).__name__}: {'; '.join(filter(None, parts))}. "
            f"Give the factory (and its arguments) with which the model was trained."
        )
    try:
        module.load_state_dict(best, strict=True)
    except RuntimeError as error:
        raise InvalidInputsError(f"The weights do not fit {type(module).__name__}: {str(error)[:500]}") from error


def _variants(weights: Weights) -> Iterator[Weights]:
    """The weights as they are, then without prefixes that all names share."""
    yield weights
    for _ in range(3):
        prefix = next((item for item in _PREFIXES if all(name.startswith(item) for name in weights)), None)
        if prefix is None or not weights:
            return
        weights = {name.removeprefix(prefix): value for name, value in weights.items()}
        yield weights


def _listed(what: str, names: list[str]) -> str:
    if not names:
        return ""
    more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return f"{len(names)} {what}: {', '.join(names[:_LISTED])}{more}"
