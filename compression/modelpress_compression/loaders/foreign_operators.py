"""Operators of a library that need not be installed: torch reads no file that calls one that nobody has defined."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch


@contextlib.contextmanager
def defined(namespace: str, one: str, define: Callable[[Any], None]) -> Iterator[None]:
    """Until the block ends the namespace has what `define` puts into a `torch.library.Library`; unless the library
    itself is there, and has defined `one` of them."""
    if hasattr(getattr(torch.ops, namespace), one):
        yield
        return
    make: Any = torch.library.Library  # torch leaves it untyped
    library = make(namespace, "FRAGMENT")
    try:
        define(library)
        yield
    finally:
        library._destroy()
