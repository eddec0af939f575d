"""What lies where a result goes, and is none that it replaces: kept under the next number, STEM.1.optimized.onnx.

Results of models of one file name have one name. The one that was made last has the usual name, so that it is found
where it always is. Replaced, not kept, are

- what is the same byte for byte;
- reports of the same model, and the result that such a report describes: many runs of one model leave one result;
- a file that the user named, and the report that describes it.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from modelpress_client.onnx_files import NotOnnxError, external_locations

# What a job makes besides models; each file is named STEM and this.
REPORTS = ("report.json", "report.html", "project.zip")
MODEL = "optimized.onnx"


@dataclass(frozen=True)
class Room:
    """For results of one file name. `report_json`: where their report is, or would be; `original`: SHA-256 in hex of
    the model that they were made of; `named`: a file that is replaced because the user named it."""

    report_json: Path
    original: str
    named: Path | None = None

    def make(self, coming: Mapping[Path, str]) -> list[str]:
        """Moves what is in the way of files that are `coming`, each with its SHA-256 in hex. Sentences on what becomes
        of what was there."""
        other = [path for path, sha256 in coming.items() if path.is_file() and file_sha256(path) != sha256]
        moving = [path for path in other if path != self.named and not self._is_replaced(path)]
        # A model refers to its data files by their names, so that both stay where they are.
        fixed = [path for path in moving if _has_data_files(path)]
        told = [f"{path} and its data files were others; they are replaced." for path in fixed]
        moving = [path for path in moving if path not in fixed]
        if self._belongs_to_named and self.report_json in other:
            told.append(f"{self.named} and its report were of another model; they are replaced.")
        if self.report_json in moving:
            moving += [path for path in self._reports if path.is_file() and path not in moving]
        return [*told, *self._move(moving)]

    def _move(self, moving: Sequence[Path]) -> Iterator[str]:
        if not moving:
            return
        number = next(number for number in itertools.count(1) if self._is_free(number, moving))
        if self.report_json in moving:
            for path in self._reports:  # of a report that had that number
                self._place(path, number).unlink(missing_ok=True)
        for path in moving:
            path.replace(self._place(path, number))
            told = "the report of another model" if path == self.report_json else "another file"
            if path == self.report_json or path not in self._reports or self.report_json not in moving:
                yield f"{path} was {told}; it is {self._place(path, number).name} now."

    def _is_replaced(self, path: Path) -> bool:
        if path in self._reports:
            return self._is_of_same or self._belongs_to_named
        return self._is_of_same and self._describes(path)

    def _is_free(self, number: int, moving: Sequence[Path]) -> bool:
        """Whether nothing has this number, or what has it may be replaced by those that move."""
        report = document(self._place(self.report_json, number))
        of_same = sha256_of(report, "original") == sha256_of(self._there, "original") != ""
        of_named = bool(self._replaced) and sha256_of(report, "optimized") == self._replaced
        for path in moving:
            place = self._place(path, number)
            if not place.exists() or (path in self._reports and (of_same or of_named)):
                continue
            if not (of_same and self.report_json in moving and file_sha256(place) == sha256_of(report, "optimized")):
                return False
        return True

    def _place(self, path: Path, number: int) -> Path:
        return path.with_name(f"{self._stem}.{number}.{path.name.removeprefix(f'{self._stem}.')}")

    @property
    def _stem(self) -> str:
        return self.report_json.name.removesuffix(f".{REPORTS[0]}")

    @property
    def _reports(self) -> list[Path]:
        return [self.report_json.with_name(f"{self._stem}.{kind}") for kind in REPORTS]

    def _describes(self, path: Path) -> bool:
        """Whether the report that is there tells of this very file."""
        return file_sha256(path) == sha256_of(self._there, "optimized")

    @property
    def _is_of_same(self) -> bool:
        return self._there is not None and sha256_of(self._there, "original") == self.original

    @property
    def _belongs_to_named(self) -> bool:
        return not self._is_of_same and bool(self._replaced) and sha256_of(self._there, "optimized") == self._replaced

    @cached_property
    def _there(self) -> Any:
        return document(self.report_json)

    @cached_property
    def _replaced(self) -> str:
        return "" if self.named is None else file_sha256(self.named)


def document(path: Path) -> Any:
    """What a report.json holds; None where there is none, or none that can be read."""
    try:
        return json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return None


def sha256_of(report: Any, which: str) -> str:
    """In hex, of one of a report's two models; empty where it has none."""
    figures = report.get(which) if isinstance(report, dict) else None
    return str(figures.get("sha256", "")) if isinstance(figures, dict) else ""


def file_sha256(path: Path) -> str:
    """In hex; empty where there is no such file."""
    if not path.is_file():
        return ""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _has_data_files(path: Path) -> bool:
    try:
        return path.name.endswith(".onnx") and bool(external_locations(path))
    except (OSError, NotOnnxError):
        return False
