"""Shapes that torch.jit.trace recorded, where it did: newer versions of torch keep them."""

from __future__ import annotations

import io
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from modelpress_compression.loaders.pickle_scan import MAX_PICKLE_BYTES
from modelpress_compression.loaders.zip_check import read_member

_TYPES = {
    "FloatStorage": "float32", "DoubleStorage": "float64", "HalfStorage": "float16", "BFloat16Storage": "bfloat16",
    "LongStorage": "int64", "IntStorage": "int32", "ShortStorage": "int16", "CharStorage": "int8",
    "ByteStorage": "uint8", "BoolStorage": "bool",
}  # fmt: skip


class _Shapes(pickle.Unpickler):
    """Knows nothing but tensors, and of these only type and shape; any other name is an error."""

    def find_class(self, module: str, name: str) -> Any:
        known: dict[tuple[str, str], Callable[..., Any]] = {
            ("torch.jit._pickle", "restore_type_tag"): lambda value, tag: value,
            ("torch._utils", "_rebuild_tensor_v2"): lambda storage, offset, size, *rest: (storage, tuple(size)),
            ("collections", "OrderedDict"): dict,
        }
        if module == "torch" and name in _TYPES:
            return _TYPES[name]
        if (module, name) not in known:
            raise pickle.UnpicklingError(name)
        return known[module, name]

    def persistent_load(self, pid: Any) -> Any:
        return pid[1]


def traced_shapes(path: Path) -> list[str]:
    """`float32[1,1,28,28]` for each tensor input of a traced module; empty where the archive has none."""
    try:
        with zipfile.ZipFile(path) as archive:
            info = next(item for item in archive.infolist() if item.filename.endswith("/traced_inputs.pkl"))
            recorded = _Shapes(io.BytesIO(read_member(archive, info, MAX_PICKLE_BYTES))).load()
        return [f"{dtype}[{','.join(str(int(dim)) for dim in shape)}]" for dtype, shape in recorded["forward"]]
    except (
        StopIteration,
        pickle.UnpicklingError,
        ValueError,
        TypeError,
        KeyError,
        IndexError,
        AttributeError,
        EOFError,
    ):
        return []
