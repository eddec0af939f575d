"""The network that weights belong to: `package.module:factory` builds it, and a checkpoint's weights are put into it.

The factory is the user's own code, run on the user's own machine only.
"""

from __future__ import annotations

import ast
import importlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from modelpress_compression.errors import InvalidInputsError, UnsupportedFormatError

Weights = Mapping[str, torch.Tensor]
# Where training scripts put the weights within a checkpoint, and what wrappers put before the names.
_NESTS = ("state_dict", "model_state_dict", "model_state", "model", "net", "network", "module", "params", "weights")
_PREFIXES = ("module.", "_orig_mod.", "model.", "net.", "network.")
_LISTED = 5


@dataclass(frozen=True)
class Architecture:
    """`module:attribute(*args, **kwargs)`; arguments are Python literals."""

    module: str
    attribute: str
    args: tuple[Any, ...] = ()
    kwargs: tuple[tuple[str, Any], ...] = ()

    @classmethod
    def parse(cls, text: str) -> Architecture:
        """Reads `package.module:factory` or `package.module:Class.method("name", classes=10)`.

        Raises InvalidInputsError.
        """
        module, colon, rest = text.strip().partition(":")
        problem = InvalidInputsError(
            f"--architecture {text!r} is not of the form package.module:factory, e.g. 'train:Net' or "
            f"'models.resnet:build(classes=10)'."
        )
        try:
            call = ast.parse(rest if "(" in rest else f"{rest}()", mode="eval").body
        except (SyntaxError, ValueError) as error:
            raise problem from error
        names = module.split(".")
        if not colon or not all(name.isidentifier() for name in names) or not isinstance(call, ast.Call):
            raise problem
        try:
            args = tuple(ast.literal_eval(item) for item in call.args)
            kwargs = tuple((str(item.arg), ast.literal_eval(item.value)) for item in call.keywords if item.arg)
        except ValueError as error:
            raise problem from error
        attribute = ast.unparse(call.func)
        if not all(name.isidentifier() for name in attribute.split(".")):
            raise problem
        return cls(module, attribute, args, kwargs)

    def build(self) -> torch.nn.Module:
        """Imports and calls. Raises InvalidInputsError with what the user's code said."""
        what = f"--architecture {self.module}:{self.attribute}"
        try:
            found: Any = importlib.import_module(self.module)
        except Exception as error:  # importing runs the user's code, which may raise anything
            raise InvalidInputsError(
                f"{what}: importing {self.module!r} failed ({type(error).__name__}: {str(error)[:300]}). The current "
                f"folder and the installed packages are searched."
            ) from error
        for name in self.attribute.split("."):
            if not hasattr(found, name):
                raise InvalidInputsError(f"{what}: {getattr(found, '__name__', found)!r} has no {name!r}.")
            found = getattr(found, name)
        if isinstance(found, torch.nn.Module):
            return found
        try:
            built = found(*self.args, **dict(self.kwargs))
        except Exception as error:  # the factory is the user's code
            raise InvalidInputsError(
                f"{what} raised {type(error).__name__}: {str(error)[:300]}. Arguments can be given as literals: "
                f"'{self.module}:{self.attribute}(classes=10)'."
            ) from error
        if not isinstance(built, torch.nn.Module):
            raise InvalidInputsError(f"{what} gave a {type(built).__name__}, not a torch.nn.Module.")
        return built


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
