"""The files of one model, and their digest."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from modelpress_compression.errors import UnsupportedFormatError
from modelpress_compression.model import Provenance

_CHUNK_BYTES = 1 << 20


@dataclass(frozen=True)
class Source:
    """`main` is the model's file, `data` are the files given beside it."""

    main: Path
    data: tuple[Path, ...] = ()

    @classmethod
    def of(cls, path: str | os.PathLike[str] | Sequence[str | os.PathLike[str]]) -> Source:
        """Raises UnsupportedFormatError where a file does not exist or is no regular file."""
        paths = [Path(path)] if isinstance(path, str | os.PathLike) else [Path(item) for item in path]
        if not paths:
            raise UnsupportedFormatError("No model file was given.")
        for item in paths:
            if not item.is_file():
                what = "a folder" if item.is_dir() else "missing"
                raise UnsupportedFormatError(f"{item.name!r} is {what}; give the model's file.")
        return cls(paths[0], tuple(paths[1:]))

    def provenance(self, model_format: str, extra: Sequence[Path] = ()) -> Provenance:
        """Digest and size of all files; `extra` are data files that were found rather than given."""
        data = {item.resolve(): item for item in (*self.data, *extra)}
        data.pop(self.main.resolve(), None)
        files = [self.main, *sorted(data.values())]
        size = sum(item.stat().st_size for item in files)
        if len(files) == 1:
            return Provenance(model_format, sha256_of(self.main), size)
        # Several files: the digest of their list, in the format of the sha256sum tool.
        lines = "".join(f"{sha256_of(item)}  {item.name}\n" for item in files)
        return Provenance(model_format, hashlib.sha256(lines.encode()).hexdigest(), size)


def sha256_of(path: Path) -> str:
    """Hex digest of a file, read piece by piece. Raises OSError."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(_CHUNK_BYTES):
            digest.update(piece)
    return digest.hexdigest()
