"""Where the files of a result go, and what they are called."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from modelpress_client.errors import UsageError

if TYPE_CHECKING:
    from modelpress_client.report import Report

# What a job makes besides models; each file is named STEM and this.
REPORTS = ("report.json", "report.html", "project.zip")
ARTIFACTS = ("model", *REPORTS)


@dataclass(frozen=True)
class ResultFiles:
    """Where the result goes."""

    model: Path
    report_json: Path
    report_html: Path
    project: Path

    @classmethod
    def of(cls, stem: str, output: Path | None, report_dir: Path | None) -> ResultFiles:
        """Those of the model with the file name `stem`; `output`: a file, or a folder that is there."""
        name = f"{stem}.{suffix_of('model')}"
        model = output or Path(name)
        if model.is_dir():
            model /= name
        reports = report_dir or model.parent
        return cls(model, *(reports / f"{stem}.{kind}" for kind in REPORTS))

    def check_writable(self) -> None:
        """Refuses early what could not be written at the end. Raises UsageError."""
        for folder in (self.model.parent, self.report_json.parent):
            existing = next(place for place in (folder.absolute(), *folder.absolute().parents) if place.exists())
            if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
                raise UsageError(f"Cannot write to {folder}; choose another place with -o or --report-dir.")

    def keep_other_report(self, report: Report) -> str:
        """Moves the report of another model that lies where `report` will out of its way; a sentence on what becomes of
        it, or nothing where there is none.

        Models of one file name have reports of one name. The one that was made last has that name, so that it is found
        where it always is. A report of the same model is replaced, and so is that of a file which the result replaces:
        so many runs of a few models leave few reports.
        """
        there = _document(self.report_json)
        if there is None or _sha256(there, "original") == report.original.sha256:
            return ""
        replaced = _file_sha256(self.model)
        if replaced and _sha256(there, "optimized") == replaced:
            return f"{self.model} and its report were of another model; they are replaced."
        moved = _moved(self.report_json, there, replaced)
        return f"{self.report_json} was the report of another model; it is {moved.name} now."


def suffix_of(item: str) -> str:
    """What follows the stem in the name of an artifact, or of a candidate, which has an id."""
    return "optimized.onnx" if item == "model" else item if item in REPORTS else f"{item}.onnx"


def _moved(report_json: Path, report: Any, replaced: str) -> Path:
    """Renames a report, and what goes with it, to STEM.1.report.json, or the next number that is free: that of a report
    of the same model is, and of a file which is `replaced`, by its SHA-256."""
    stem = report_json.name.removesuffix(".report.json")
    for number in itertools.count(1):
        target = report_json.with_name(f"{stem}.{number}.report.json")
        there = _document(target)
        of_same = there is not None and _sha256(there, "original") == _sha256(report, "original")
        if not target.exists() or of_same or (replaced and _sha256(there, "optimized") == replaced):
            break
    for kind in REPORTS:
        path, place = (report_json.with_name(f"{name}.{kind}") for name in (stem, f"{stem}.{number}"))
        if path.exists():
            path.replace(place)
        else:
            place.unlink(missing_ok=True)
    return target


def _document(path: Path) -> Any:
    """What a report.json holds; None where there is none, or none that can be read."""
    try:
        return json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return None


def _sha256(document: Any, which: str) -> str:
    """In hex, of one of the two models; empty where the document has none."""
    figures = document.get(which) if isinstance(document, dict) else None
    return str(figures.get("sha256", "")) if isinstance(figures, dict) else ""


def _file_sha256(path: Path) -> str:
    """In hex; empty where there is no such file."""
    if not path.is_file():
        return ""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
