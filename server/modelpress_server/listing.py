"""Filters and page tokens of the List methods.

A filter is terms joined by AND: `state = ACTIVE`, `labels.KEY = "value"`, `model = "NAME"`.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import re
from collections.abc import Mapping
from typing import TypeVar

from google.protobuf.message import Message

from modelpress_server.config import MIB
from modelpress_server.errors import FieldViolation, InvalidFieldsError, clip
from modelpress_server.names import parse_name
from modelpress_server.stores.base import ListQuery
from modelpress_server.validation import DEFAULT_PAGE_SIZE, MAX_PAGE_SIZE, Checks

Item = TypeVar("Item", bound=Message)

MAX_FILTER_CHARS = 4096
MAX_TERMS = 20
MAX_PAGE_BYTES = 3 * MIB  # clients take 4 MiB

_TERM = re.compile(
    r"""\s*(?P<field>[A-Za-z0-9_.-]+)\s*=\s*(?:"(?P<quoted>(?:[^"\\]|\\.)*)"|(?P<bare>[^\s"]+))\s*(?P<rest>.*)""",
    re.DOTALL,
)
_AND = re.compile(r"AND\s+(?P<rest>.+)", re.DOTALL)
_TOKEN = re.compile(r"([0-9a-z]{26})([0-9a-f]{16})")


def list_query(
    project: str, page_size: int, page_token: str, text: str, states: Mapping[str, int], *, by_model: bool
) -> ListQuery:
    """The query of a List request; `states` has the words that `state` takes. Raises InvalidFieldsError."""
    checks = Checks()
    checks.require(page_size >= 0, "page_size", f"{page_size} is negative")
    before_id = _read_token(page_token, project, text, checks)
    terms = _terms(text, checks)
    state: int | None = None
    model_id: str | None = None
    labels: list[tuple[str, str]] = []
    for field, value in terms:
        if field == "state" and value in states:
            state = states[value]
        elif field == "state":
            checks.add("filter", f"state {clip(value, 40)!r} is not one of {', '.join(states)}")
        elif field.startswith("labels."):
            labels.append((field.removeprefix("labels."), value))
        elif field == "model" and by_model:
            model_project, model_id = parse_name(value, "models", "filter")
            checks.require(model_project == project, "filter", "model is of another project")
        else:
            known = "state, labels.KEY" + (", model" if by_model else "")
            checks.add("filter", f"unknown field {clip(field, 40)!r}; there are {known}")
    checks.finish()
    size = min(page_size or DEFAULT_PAGE_SIZE, MAX_PAGE_SIZE)
    return ListQuery(project, size, before_id, state, tuple(labels), model_id)


def page_token(query: ListQuery, text: str, last_id: str) -> str:
    """The token of the page after the one that ends with `last_id`."""
    return base64.urlsafe_b64encode((last_id + _scope(query.project, text)).encode()).decode()


def fitted(messages: list[Item], *, has_more: bool) -> tuple[list[Item], bool]:
    """As many as fit one gRPC message, at least one, and whether others follow."""
    total_bytes = 0
    for index, message in enumerate(messages):
        total_bytes += message.ByteSize()
        if index and total_bytes > MAX_PAGE_BYTES:
            return messages[:index], True
    return messages, has_more


def _terms(text: str, checks: Checks) -> list[tuple[str, str]]:
    terms: list[tuple[str, str]] = []
    rest = text.strip()
    checks.require(len(rest) <= MAX_FILTER_CHARS, "filter", f"is longer than {MAX_FILTER_CHARS} characters")
    while rest and not checks.violations:
        match = _TERM.fullmatch(rest)
        if match is None or len(terms) == MAX_TERMS:
            checks.add("filter", f'cannot read {clip(rest, 60)!r}; write terms as FIELD = "VALUE", joined by AND')
            break
        quoted = match["quoted"]
        value = re.sub(r"\\(.)", r"\1", quoted) if quoted is not None else match["bare"]
        terms.append((match["field"], value))
        rest = match["rest"]
        if rest:
            joined = _AND.fullmatch(rest)
            if joined is None:
                checks.add("filter", f"expected AND, found {clip(rest, 60)!r}")
                break
            rest = joined["rest"]
    return terms


def _read_token(token: str, project: str, text: str, checks: Checks) -> str | None:
    if not token:
        return None
    try:
        match = _TOKEN.fullmatch(base64.urlsafe_b64decode(token.encode()).decode())
    except (binascii.Error, UnicodeError, ValueError):
        match = None
    if match is None or match[2] != _scope(project, text):
        checks.add("page_token", "is not a next_page_token of this list with this filter; start from the first page")
        return None
    return match[1]


def _scope(project: str, text: str) -> str:
    return hashlib.sha256(f"{project}\n{text}".encode(errors="replace")).hexdigest()[:16]


def wrong_field(field: str, description: str) -> InvalidFieldsError:
    """An error with a single violation."""
    return InvalidFieldsError([FieldViolation(field, description)])
