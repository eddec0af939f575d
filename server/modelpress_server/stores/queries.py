"""What is asked of every store alike: a list page by page, a request once, whose turn it is."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

Item = TypeVar("Item")


@dataclass(frozen=True, slots=True)
class RequestKey:
    """A client's request id with the hash of what it asked for."""

    request_id: str
    payload_sha256: bytes


@dataclass(frozen=True, slots=True)
class Term:
    """A comparison: `field` is state, model (its id), label (of `key`), create_time or end_time (microseconds).

    `operator`: = != < <= > >=, and : for a label that is there with any value. A label that is not there is not equal
    to any value; a time that is not there compares with nothing.
    """

    field: str
    operator: str
    value: str | int
    key: str = ""


@dataclass(frozen=True, slots=True)
class ListQuery:
    """One page of a list, newest first; `before_id` is the last id of the page before.

    `projects`: of which; None: of all. `where`: of each clause, one term holds.
    """

    projects: tuple[str, ...] | None
    page_size: int
    before_id: str | None = None
    where: tuple[tuple[Term, ...], ...] = ()


@dataclass(frozen=True, slots=True)
class Page(Generic[Item]):
    """Items of one page, and whether others follow."""

    items: tuple[Item, ...]
    has_more: bool


# Orders projects that have something waiting, the oldest first, by whose turn it is; leaves out who may not start more.
Rank = Callable[[Sequence[str]], Sequence[str]]


def etag(version: int) -> str:
    """The etag of a version."""
    return f"v{version}"
