"""What each project may use: the server's settings, and a TOML file that says otherwise for single projects.

    [team-a]                  # projects/team-a
    weight = 2.0              # twice the share of one with 1.0
    max_running_jobs = 1
    job_ttl_s = 604800

The file is read again when it has changed; while it cannot be read, what was read last holds.
"""

from __future__ import annotations

import logging
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from modelpress_server.config import Settings, SettingsError
from modelpress_server.names import is_project
from modelpress_server.watched_file import WatchedFile

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class ProjectLimits:
    """Limits of one project; 0: none, but for `weight`, and `findings_bytes`, of which 0 keeps nothing."""

    weight: float = 1.0
    max_queued_jobs: int = 0
    max_running_jobs: int = 0
    max_models: int = 0
    max_pending_models: int = 0
    max_open_uploads: int = 0
    max_stored_bytes: int = 0
    requests_per_s: float = 0.0
    findings_bytes: int = 0
    job_ttl_s: float = 0.0
    model_ttl_s: float = 0.0

    @classmethod
    def of_settings(cls, settings: Settings) -> ProjectLimits:
        """Limits of a project that the file does not name."""
        return cls(**{item.name: getattr(settings, item.name) for item in fields(cls) if item.name != "weight"})


class Projects:
    """The limits of all projects."""

    def __init__(self, settings: Settings) -> None:
        """Raises SettingsError where the file is wrong."""
        self._default = ProjectLimits.of_settings(settings)
        self._file: WatchedFile[Mapping[str, ProjectLimits]] | None = None
        if settings.projects_file is not None:
            self._file = WatchedFile(settings.projects_file, self._read, "projects_file")

    def limits(self, project: str) -> ProjectLimits:
        """What a project may use."""
        return self._default if self._file is None else self._file.get().get(project, self._default)

    def _read(self, path: Path) -> Mapping[str, ProjectLimits]:
        try:
            document = tomllib.loads(path.read_text("utf-8"))
        except ValueError as error:
            raise SettingsError(f"projects_file: cannot read {path}: {error}") from error
        return {project: self._limits(path, project, table) for project, table in document.items()}

    def _limits(self, path: Path, project: str, table: Any) -> ProjectLimits:
        known = {item.name: type(getattr(self._default, item.name)) for item in fields(ProjectLimits)}
        where = f"projects_file: {path}, [{project}]"
        if not is_project(project) or not isinstance(table, dict):
            raise SettingsError(f"{where}: is not a table of a project; write [NAME], then one limit a line.")
        for name, value in table.items():
            if name not in known:
                raise SettingsError(f"{where}: there is no limit {name}; there are {', '.join(known)}.")
            right = isinstance(value, int | known[name]) and not isinstance(value, bool)
            if not right or value < 0 or (name == "weight" and value == 0):
                raise SettingsError(f"{where}: {name} = {value!r} is not a number of at least 0 (weight: more than 0).")
        return replace(self._default, **table)
