"""Pages of the List methods, and their tokens."""

from __future__ import annotations

import base64
import binascii
import hashlib
import re
from dataclasses import dataclass
from typing import TypeVar

from google.protobuf.message import Message

from modelpress_server.config import MIB
from modelpress_server.errors import FieldViolation, InvalidFieldsError
from modelpress_server.filters import Fields, read_filter
from modelpress_server.names import ANY_PROJECT
from modelpress_server.stores.queries import ListQuery
from modelpress_server.validation import DEFAULT_PAGE_SIZE, MAX_PAGE_SIZE, Checks

Item = TypeVar("Item", bound=Message)

MAX_PAGE_BYTES = 3 * MIB  # clients take 4 MiB

_TOKEN = re.compile(r"([0-9a-z]{26})([0-9a-f]{16})")


@dataclass(frozen=True)
class Scope:
    """What a list goes over. `parent`: a project, or ANY_PROJECT; `projects`: those of it that the caller may see.

    None: all that there are.
    """

    parent: str
    projects: tuple[str, ...] | None


def list_query(scope: Scope, page_size: int, page_token: str, text: str, fields: Fields) -> ListQuery:
    """The query of a List request. Raises InvalidFieldsError."""
    checks = Checks()
    checks.require(page_size >= 0, "page_size", f"{page_size} is negative")
    before_id = _read_token(page_token, scope.parent, text, checks)
    where = read_filter(text, None if scope.parent == ANY_PROJECT else scope.parent, fields, checks)
    checks.finish()
    return ListQuery(scope.projects, min(page_size or DEFAULT_PAGE_SIZE, MAX_PAGE_SIZE), before_id, where)


def page_token(scope: Scope, text: str, last_id: str) -> str:
    """The token of the page after the one that ends with `last_id`."""
    return base64.urlsafe_b64encode((last_id + _list_hash(scope.parent, text)).encode()).decode()


def fitted(messages: list[Item], *, has_more: bool) -> tuple[list[Item], bool]:
    """As many as fit one gRPC message, at least one, and whether others follow."""
    total_bytes = 0
    for index, message in enumerate(messages):
        total_bytes += message.ByteSize()
        if index and total_bytes > MAX_PAGE_BYTES:
            return messages[:index], True
    return messages, has_more


def _read_token(token: str, project: str, text: str, checks: Checks) -> str | None:
    if not token:
        return None
    try:
        match = _TOKEN.fullmatch(base64.urlsafe_b64decode(token.encode()).decode())
    except (binascii.Error, UnicodeError, ValueError):
        match = None
    if match is None or match[2] != _list_hash(project, text):
        checks.add("page_token", "is not a next_page_token of this list with this filter; start from the first page")
        return None
    return match[1]


def _list_hash(project: str, text: str) -> str:
    return hashlib.sha256(f"{project}\n{text}".encode(errors="replace")).hexdigest()[:16]


def wrong_field(field: str, description: str) -> InvalidFieldsError:
    """An error with a single violation."""
    return InvalidFieldsError([FieldViolation(field, description)])
