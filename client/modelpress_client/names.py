"""Resource names and list filters as people spell them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from modelpress_client.errors import UsageError

_SEGMENT = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9_.-]{0,127})")
_FULL = re.compile(rf"projects/({_SEGMENT.pattern})/(models|jobs)/({_SEGMENT.pattern})")
_LABEL_KEY = re.compile(r"[a-z0-9_.-]{1,63}")
MAX_LABEL_CHARS = 255


def check_project(project: str) -> str:
    """The project as it is. Raises UsageError for one that cannot be part of a name."""
    if not _SEGMENT.fullmatch(project):
        raise UsageError(f"'{project}' is not a project; use letters, digits, '.', '_' and '-'.")
    return project


def full_name(name: str, collection: str | None, project: str) -> str:
    """`projects/P/models/M` for the full name, `models/M` or, where the collection is known, `M` alone."""
    parts = name.strip("/").split("/")
    if len(parts) == 1 and collection is not None:
        parts = [collection, *parts]
    if len(parts) == 2:
        parts = ["projects", project, *parts]
    full = "/".join(parts)
    match = _FULL.fullmatch(full)
    if match is None or (collection is not None and match[2] != collection):
        wanted = f"projects/{project}/{collection or 'models|jobs'}/ID"
        raise UsageError(f"'{name}' is not the name of a {(collection or 'model or jobs')[:-1]}; write {wanted}")
    return full


def short_name(name: str) -> str:
    """The last part."""
    return name.rsplit("/", 1)[-1]


def parse_labels(texts: Iterable[str]) -> dict[str, str]:
    """`k=v` each. Raises UsageError."""
    labels = {}
    for text in texts:
        key, separator, value = text.partition("=")
        if not separator or not _LABEL_KEY.fullmatch(key) or len(value) > MAX_LABEL_CHARS or not value.isprintable():
            raise UsageError(f"'{text}' is not a label; write KEY=VALUE, KEY of a-z, 0-9, '_', '.', '-' (at most 63).")
        labels[key] = value
    return labels


def filter_text(state: str | None, labels: Mapping[str, str] | None) -> str:
    """The `filter` of a list call."""
    terms = [f"state = {state.upper()}"] if state else []
    for key, value in (labels or {}).items():
        if not _LABEL_KEY.fullmatch(key):
            raise UsageError(f"'{key}' is not the key of a label.")
        escaped = value.replace("\\", "\\\\").replace('"', '\\"')
        terms.append(f'labels.{key} = "{escaped}"')
    return " AND ".join(terms)
