"""Resource names and ids.

A name is `projects/{project}` or `projects/{project}/{collection}/{id}`. Ids are 26 characters of lower-case Crockford
base32: 48 bits of milliseconds, then 80 bits of which a counter keeps ids of one process in order (as in ULID).
"""

from __future__ import annotations

import re
import secrets
import threading
import time
import unicodedata
from collections.abc import Iterable
from typing import Literal

from modelpress_server.errors import FieldViolation, InvalidFieldsError, clip

Collection = Literal["models", "jobs", "uploads"]
MAX_PATH_BYTES = 240
# `projects/-`: all projects that the caller may see (AIP-159).
ANY_PROJECT = "-"

_ALPHABET = "0123456789abcdefghjkmnpqrstvwxyz"
_PROJECT = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,62}")
_ID = re.compile(r"[0-9a-z]{26}")


class IdGenerator:
    """Makes ids that sort by the time they were made, also within one millisecond."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._last = 0

    def __call__(self) -> str:
        fresh = (time.time_ns() // 1_000_000) << 80 | secrets.randbits(79)
        with self._lock:
            # A clock that went back must not reorder jobs.
            self._last = fresh if fresh > self._last and fresh >> 80 > self._last >> 80 else self._last + 1
            value = self._last
        return "".join(_ALPHABET[value >> shift & 31] for shift in range(125, -1, -5))


new_id = IdGenerator()


def first_id_at(time_us: int) -> str:
    """The smallest id that could be made at a time: what was made before has a smaller one."""
    value = time_us // 1000 << 80
    return "".join(_ALPHABET[value >> shift & 31] for shift in range(125, -1, -5))


def time_of_id_us(resource_id: str) -> int:
    """When an id was made; the inverse of `first_id_at`, to the millisecond."""
    value = 0
    for character in resource_id:
        value = value << 5 | _ALPHABET.index(character)
    return (value >> 80) * 1000


def is_project(text: str) -> bool:
    """Whether a text can be the name of a project."""
    return _PROJECT.fullmatch(text) is not None


def format_name(project: str, collection: Collection, resource_id: str) -> str:
    """`projects/{project}/{collection}/{id}`."""
    return f"projects/{project}/{collection}/{resource_id}"


def parse_project(parent: str, field: str = "parent") -> str:
    """The project of `projects/{project}`. Raises InvalidFieldsError."""
    head, _, project = parent.partition("/")
    if head != "projects" or not is_project(project):
        raise _wrong(field, parent, "projects/{project}, the project of 1 to 63 characters [A-Za-z0-9_-]")
    return project


def parse_projects(parent: str, field: str = "parent") -> str:
    """The project of `projects/{project}`, or ANY_PROJECT of `projects/-`. Raises InvalidFieldsError."""
    return ANY_PROJECT if parent == f"projects/{ANY_PROJECT}" else parse_project(parent, field)


def parse_name(name: str, collection: Collection, field: str = "name") -> tuple[str, str]:
    """Project and id of `projects/{project}/{collection}/{id}`. Raises InvalidFieldsError."""
    parts = name.split("/")
    well_formed = len(parts) == 4 and parts[0] == "projects" and parts[2] == collection
    if not well_formed or not _PROJECT.fullmatch(parts[1]) or not _ID.fullmatch(parts[3]):
        wanted = f"projects/{{project}}/{collection}/{{id}}, with an id of 26 letters and digits, as lists show it"
        raise _wrong(field, name, wanted)
    return parts[1], parts[3]


def path_fault(path: str) -> str | None:
    """Why a manifest path is refused, or None: it must stay inside its folder on every platform."""
    try:
        size_bytes = len(path.encode())
    except UnicodeEncodeError:
        return "is not valid Unicode"
    faults = {
        "is empty": not path,
        f"has {size_bytes} bytes; at most {MAX_PATH_BYTES} are allowed": size_bytes > MAX_PATH_BYTES,
        "contains a control character": any(unicodedata.category(char).startswith("C") for char in path),
        "contains a backslash; separate folders with '/'": "\\" in path,
        "is not in Unicode normal form C": not unicodedata.is_normalized("NFC", path),
        "must be relative, without empty, '.' or '..' parts": bool({"", ".", ".."} & set(path.split("/"))),
    }
    return next((fault for fault, found in faults.items() if found), None)


def clashing_path(paths: Iterable[str]) -> str | None:
    """The first path that stands twice, or is both a file and a folder; None: all fit together."""
    files: set[str] = set()
    folders: set[str] = set()
    for path in paths:
        parts = path.split("/")
        parents = {"/".join(parts[:count]) for count in range(1, len(parts))}
        if path in files or path in folders or parents & files:
            return path
        files.add(path)
        folders |= parents
    return None


def _wrong(field: str, value: str, expected: str) -> InvalidFieldsError:
    return InvalidFieldsError([FieldViolation(field, f"{clip(value, 80)!r} is not {expected}")])
