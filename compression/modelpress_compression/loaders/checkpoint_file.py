"""A checkpoint's tensors and how they are nested, read without running anything that the file says.

Checkpoints carry more than tensors: settings, paths, NumPy scalars, whole modules. torch's own reader for tensors alone
refuses them; here each foreign class is read as an `Inert` object, which keeps what the file gives it and does nothing.
"""

from __future__ import annotations

import math
import pickle
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from modelpress_compression.errors import (
    CompressionError,
    InvalidInputsError,
    RejectedModelError,
    UnsupportedFormatError,
)
from modelpress_compression.loaders.checked_copy import checked_file
from modelpress_compression.loaders.quiet import quiet

_MAX_DEPTH = 200  # modules within modules
_NUMBER_TYPES = ("f2", "f4", "f8", "i1", "i2", "i4", "i8", "u1", "b1")


class Inert:
    """Stands for an object of a class that is not imported. `state`, `items`: what the file would have set."""

    state: Any
    items: dict[Any, Any]

    def __new__(cls, *_: object, **__: object) -> Inert:
        """Takes the arguments of any class."""
        made = super().__new__(cls)
        made.state, made.items = None, {}
        return made

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def __setitem__(self, key: Any, value: Any) -> None:
        self.items[key] = value

    def __call__(self, *_: object, **__: object) -> Inert:
        """For names that are functions, and for what they give."""
        return Inert()

    def append(self, value: Any) -> None:
        """As of a list of a class of its own."""
        self.items[len(self.items)] = value


class _NumberType(Inert):
    """Stands for numpy.dtype. `code`: as NumPy writes it, without the order of bytes, as "f4"."""

    code: str
    order: str

    def __init__(self, code: object = "", *_: object) -> None:
        """Takes what numpy.dtype takes."""
        self.code, self.order = str(code), "<"

    def __setstate__(self, state: Any) -> None:
        self.order = str(state[1]) if isinstance(state, tuple) and len(state) > 1 else "<"


class StoredArray(Inert):
    """Stands for an array of NumPy, which some write weights as. `tensor`: its numbers; None: it holds others."""

    tensor: torch.Tensor | None = None

    def __setstate__(self, state: Any) -> None:
        match state:
            case (_, tuple(shape), _NumberType() as kind, bool(columns_first), bytes(content)):
                self.tensor = _tensor_of(shape, kind, columns_first, content)


def _tensor_of(shape: tuple[Any, ...], kind: _NumberType, columns_first: bool, content: bytes) -> torch.Tensor | None:
    if kind.code not in _NUMBER_TYPES or not all(isinstance(dim, int) and dim >= 0 for dim in shape):
        return None
    dtype = np.dtype(kind.code).newbyteorder(">" if kind.order == ">" else "<")
    if len(content) != math.prod(shape) * dtype.itemsize:
        return None
    array = np.frombuffer(content, dtype).astype(dtype.newbyteorder("="))
    return torch.from_numpy(array.reshape(shape, order="F" if columns_first else "C").copy())


class _TensorUnpickler(pickle.Unpickler):
    """Knows tensors; any other name is an `Inert` class.

    Everything that it gives out for a name is made here or cannot be changed: the opcode BUILD sets attributes of
    whatever lies on the stack, functions and classes included.
    """

    def find_class(self, module: str, name: str) -> Any:
        if module == "torch" and isinstance(found := getattr(torch, name, None), torch.dtype):
            return found
        known = _rebuilders().get(f"{module}.{name}")
        return known or type(name.rpartition(".")[2], (Inert,), {"__module__": module})


class _TensorPickle:
    """What torch.load takes for Python's module `pickle`."""

    Unpickler = _TensorUnpickler
    UnpicklingError = pickle.UnpicklingError

    @staticmethod
    def load(file: Any, **options: Any) -> Any:
        return _TensorUnpickler(file, **options).load()


def _rebuilders() -> dict[str, Callable[..., Any]]:
    """How tensors are put together, anew for every name, so that no pickle changes them for another."""
    utils: Any = torch._utils
    array = {f"numpy.{core}.multiarray._reconstruct": lambda *_: StoredArray() for core in ("core", "_core")}
    return {
        **array,
        "numpy.dtype": type("dtype", (_NumberType,), {}),
        "_codecs.encode": lambda text, *_: str(text).encode("latin1", "replace"),
        "collections.OrderedDict": type("OrderedDict", (dict,), {"__setstate__": lambda *_: None}),
        "collections.defaultdict": lambda *_: {},
        # A set's members need a hash, which inert objects of equal content do not share.
        "builtins.set": lambda items=(): tuple(items),
        "__builtin__.set": lambda items=(): tuple(items),
        "torch.Size": tuple,
        "torch.storage.UntypedStorage": torch.UntypedStorage,
        "torch.UntypedStorage": torch.UntypedStorage,
        "torch._utils._rebuild_tensor": lambda *args: utils._rebuild_tensor(*args[:4]),
        "torch._utils._rebuild_tensor_v2": lambda *args: utils._rebuild_tensor(*args[:4]),
        "torch._utils._rebuild_tensor_v3": lambda *args: utils._rebuild_tensor_v3(*args[:4], False, {}, args[6]),
        "torch._utils._rebuild_parameter": lambda data, *_: data,
        "torch._utils._rebuild_parameter_with_state": lambda data, *_: data,
        "torch._tensor._rebuild_from_type_v2": lambda rebuild, _, args, *__: rebuild(*args),
    }


def read_safetensors(path: Path) -> dict[str, torch.Tensor]:
    """All tensors, on the CPU. Raises UnsupportedFormatError."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except SafetensorError as error:
        raise UnsupportedFormatError(f"The safetensors file is damaged ({error}); fetch or write it again.") from error


def read_pickle(path: Path, *, trusted: bool) -> Any:
    """What torch.save wrote. `trusted`: whether the code in it runs; without, foreign objects come as `Inert`.

    Raises RejectedModelError, InvalidInputsError, UnsupportedFormatError.
    """
    if trusted:
        return _trusted(path)
    try:
        with checked_file(path, "The PyTorch archive") as checked, quiet():
            return torch.load(checked, map_location="cpu", weights_only=False, pickle_module=_TensorPickle)
    except CompressionError:
        raise
    except Exception as error:  # whatever a damaged or deceitful pickle makes of torch's own reader
        raise RejectedModelError(
            f"The weights cannot be read without running the code in the file ({_said(error)}). If it is whole and you "
            "trust whoever wrote it, add --trust-pickle; or save the weights alone with "
            "torch.save(model.state_dict(), PATH).",
            finding="PICKLE_GLOBAL",
        ) from error


def _trusted(path: Path) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=False)
    except Exception as error:  # unpickling runs the file's own code and imports
        raise InvalidInputsError(
            f"Loading the file failed ({_said(error)}). The packages that it was saved with must be importable here; "
            "the current folder is searched."
        ) from error


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error)[:300]}"


def module_weights(found: Any) -> dict[str, torch.Tensor] | None:
    """The state dict of a module, live or inert; None for anything else."""
    if isinstance(found, torch.nn.Module):
        return {name: value for name, value in found.state_dict().items() if isinstance(value, torch.Tensor)}
    if isinstance(found, Inert) and isinstance(found.state, Mapping) and "_parameters" in found.state:
        return dict(_inert_tensors(found.state, "", 0))
    return None


def array_weights(found: Any) -> torch.Tensor | None:
    """A tensor, or an array of NumPy as one; None for anything else."""
    if isinstance(found, np.ndarray) and found.dtype.str[1:] in _NUMBER_TYPES:
        return torch.from_numpy(np.ascontiguousarray(found.astype(found.dtype.newbyteorder("="))))
    return found.tensor if isinstance(found, StoredArray) else found if isinstance(found, torch.Tensor) else None


def _inert_tensors(state: Mapping[Any, Any], prefix: str, depth: int) -> Iterator[tuple[str, torch.Tensor]]:
    if depth > _MAX_DEPTH:
        raise UnsupportedFormatError("The file holds modules that are nested without an end; it is damaged.")
    passing = state.get("_non_persistent_buffers_set")
    unsaved = passing if isinstance(passing, tuple | set) else ()
    for part in ("_parameters", "_buffers"):
        for name, value in _mapping(state.get(part)).items():
            if isinstance(value, torch.Tensor) and name not in unsaved:
                yield f"{prefix}{name}", value
    for name, inner in _mapping(state.get("_modules")).items():
        if isinstance(inner, Inert) and isinstance(inner.state, Mapping):
            yield from _inert_tensors(inner.state, f"{prefix}{name}.", depth + 1)


def _mapping(found: Any) -> Mapping[Any, Any]:
    return found if isinstance(found, Mapping) else {}
