"""Where the files of a result go, and what they are called."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from modelpress_client.cli.keeping import MODEL, REPORTS, Room
from modelpress_client.errors import UsageError

if TYPE_CHECKING:
    from modelpress_client.async_job import AsyncJob

ARTIFACTS = ("model", *REPORTS)


@dataclass(frozen=True)
class ResultFiles:
    """Where the result goes. `is_named`: the model's file was named, not the folder that it goes to."""

    model: Path
    report_json: Path
    report_html: Path
    project: Path
    is_named: bool

    @classmethod
    def of(cls, stem: str, output: Path | None, report_dir: Path | None) -> ResultFiles:
        """Those of the model with the file name `stem`; `output`: a file, or a folder that is there."""
        name = f"{stem}.{MODEL}"
        model = output or Path(name)
        is_named = output is not None and not model.is_dir()
        if model.is_dir():
            model /= name
        reports = report_dir or model.parent
        report_json, report_html, project = (reports / f"{stem}.{kind}" for kind in REPORTS)
        return cls(model, report_json, report_html, project, is_named)

    def check_writable(self) -> None:
        """Refuses early what could not be written at the end. Raises UsageError."""
        for folder in (self.model.parent, self.report_json.parent):
            existing = next(place for place in (folder.absolute(), *folder.absolute().parents) if place.exists())
            if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
                raise UsageError(f"Cannot write to {folder}; choose another place with -o or --report-dir.")

    def make_room(self, original: str, digests: dict[str, str]) -> list[str]:
        """Keeps what is there and is none that the result replaces (see `keeping`): sentences on what becomes of it.

        `original`: SHA-256 in hex of the model that was compressed; `digests`: as `digests_of` gives them.
        """
        paths = dict(zip(ARTIFACTS, (self.model, self.report_json, self.report_html, self.project), strict=True))
        coming = {path: digests[item] for item, path in paths.items() if item in digests}
        return Room(self.report_json, original, self.model if self.is_named else None).make(coming)


def suffix_of(item: str) -> str:
    """What follows the stem in the name of an artifact, or of a candidate, which has an id."""
    return MODEL if item == "model" else item if item in REPORTS else f"{item}.onnx"


def digests_of(job: AsyncJob) -> dict[str, str]:
    """SHA-256 in hex of what can be downloaded, by the names of artifacts and the ids of candidates; of a model with
    data files, that of its main file."""
    from modelpress_client.resources import ARTIFACTS as KINDS

    names = {kind: name for name, kind in KINDS.items()}
    found = {item.candidate or names.get(item.kind, ""): item for item in job.message.artifacts if item.files}
    return {name: item.files[0].digest.sha256.hex() for name, item in found.items() if name}
