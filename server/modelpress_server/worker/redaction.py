"""Paths of this machine out of texts that a user will see: exceptions and libraries like to name files.

Only known folders are taken out. A pattern for "any path" would eat the names of ONNX nodes, which look the same
(`/layer1/conv1/Conv`).
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterable
from pathlib import Path


class Redactor:
    """Removes folders from texts: `/srv/data/work/model.onnx` becomes `model.onnx`."""

    def __init__(self, folders: Iterable[str | os.PathLike[str]]) -> None:
        python = {sys.prefix, sys.base_prefix, *(entry for entry in sys.path if Path(entry).is_absolute())}
        found = {os.path.normpath(folder) for folder in (*(os.fspath(folder) for folder in folders), *python)}
        resolved = {os.path.realpath(folder) for folder in found}
        # "/usr" as prefix of a Python installation is no secret, but taking it out would maim harmless texts less than
        # it would help; "/" must never be taken out.
        longest_first = sorted((found | resolved) - {"/", "."}, key=len, reverse=True)
        self._pattern = re.compile("|".join(f"{re.escape(folder)}(?:/|(?![\\w.-]))" for folder in longest_first))

    def __call__(self, text: str) -> str:
        return self._pattern.sub("", text)
