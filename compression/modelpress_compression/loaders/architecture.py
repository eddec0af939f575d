"""The network that weights belong to: `package.module:factory` builds it.

The factory is the user's own code, run on the user's own machine only.
"""

from __future__ import annotations

import ast
import importlib
from dataclasses import dataclass
from typing import Any

import torch

from modelpress_compression.errors import InvalidInputsError


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
            for name in self.attribute.split("."):
                absent = not hasattr(found, name)  # raises where a library imports its parts as they are asked for
                if absent:
                    break
                found = getattr(found, name)
        except Exception as error:  # importing runs the user's code, which may raise anything
            raise InvalidInputsError(
                f"{what}: importing {self.module!r} failed ({type(error).__name__}: {str(error)[:300]}). The current "
                f"folder and the installed packages are searched."
            ) from error
        if absent:
            raise InvalidInputsError(f"{what}: {getattr(found, '__name__', found)!r} has no {name!r}.")
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
