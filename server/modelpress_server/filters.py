"""Filters of the List methods: a part of AIP-160.

    filter = clause {AND clause}          all of them hold
    clause = term {OR term} | "(" clause ")"        OR binds tighter than AND, as AIP-160 has it
    term   = FIELD OPERATOR VALUE

    state = RUNNING OR state = QUEUED
    labels.team = "vision" AND (state = FAILED OR state = EXPIRED) AND create_time >= "2026-11-01T00:00:00Z"

A text is read in one pass, and its length and its terms are bounded.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from modelpress_server.errors import InvalidFieldsError, clip
from modelpress_server.names import parse_name
from modelpress_server.stores.queries import Term
from modelpress_server.validation import Checks

MAX_FILTER_CHARS = 4096
MAX_TERMS = 20

EQUALITY = ("=", "!=")
ORDER = ("=", "!=", "<", "<=", ">", ">=")
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_TOKEN = re.compile(
    r"""\s*(?:
        (?P<bracket>[()])
      | (?P<joint>AND|OR)(?=[\s(]|$)
      | (?P<field>[A-Za-z0-9_.-]+)\s*(?P<operator>!=|<=|>=|=|<|>|:)\s*
        (?:"(?P<quoted>(?:[^"\\]|\\.)*)"|(?P<bare>[^\s"()]+))
    )\s*""",
    re.DOTALL | re.VERBOSE,
)


@dataclass(frozen=True)
class Fields:
    """What a list can be filtered by. `states`: the words that `state` takes; `times`: fields that hold a time."""

    states: Mapping[str, int]
    times: Collection[str] = ()
    by_model: bool = False

    def names(self) -> str:
        """All, for people."""
        return ", ".join(["state", "labels.KEY", *(["model"] if self.by_model else []), *self.times])


def read_filter(text: str, project: str | None, fields: Fields, checks: Checks) -> tuple[tuple[Term, ...], ...]:
    """What must hold: of each clause, one term. `project`: of which models may be named; None: of any.

    Whatever is wrong with the text is noted in `checks`.
    """
    if len(text) > MAX_FILTER_CHARS:
        checks.add("filter", f"is longer than {MAX_FILTER_CHARS} characters")
        return ()
    return _Reader(text.strip(), project, fields, checks).clauses()


class _Reader:
    def __init__(self, text: str, project: str | None, fields: Fields, checks: Checks) -> None:
        self._text = text
        self._at = 0
        self._project = project
        self._fields = fields
        self._checks = checks
        self._terms = 0

    def clauses(self) -> tuple[tuple[Term, ...], ...]:
        found: list[tuple[Term, ...]] = []
        while self._text and not self._checks.violations:
            found.append(self._clause())
            if self._at == len(self._text) or self._checks.violations:
                break
            self._expect("joint", "AND")
        return tuple(found)

    def _clause(self) -> tuple[Term, ...]:
        bracket = self._take("bracket", "(")
        terms = [self._term()]
        while not self._checks.violations and self._take("joint", "OR"):
            terms.append(self._term())
        if bracket:
            self._expect("bracket", ")")
        return tuple(term for term in terms if term is not None)

    def _term(self) -> Term | None:
        match = _TOKEN.match(self._text, self._at)
        self._terms += 1
        if match is None or match["field"] is None or self._terms > MAX_TERMS:
            self._checks.add(
                "filter",
                f"cannot read {clip(self._text[self._at :], 60)!r}; write at most {MAX_TERMS} terms as "
                'FIELD = "VALUE", joined by AND and OR; parentheses hold terms joined by OR',
            )
            return None
        self._at = match.end()
        quoted = match["quoted"]
        value = re.sub(r"\\(.)", r"\1", quoted, flags=re.DOTALL) if quoted is not None else match["bare"]
        return self._checked(match["field"], match["operator"], value)

    def _checked(self, field: str, operator: str, value: str) -> Term | None:
        fields, checks = self._fields, self._checks
        if field.startswith("labels.") and operator in (*EQUALITY, ":"):
            if operator == ":" and value != "*":
                checks.add("filter", f"{clip(field, 60)}: only `:*` is known, for: has this label")
            return Term("label", operator, value, key=field.removeprefix("labels."))
        if field == "state" and operator in EQUALITY:
            if value not in fields.states:
                checks.add("filter", f"state {clip(value, 40)!r} is not one of {', '.join(fields.states)}")
            return Term("state", operator, fields.states.get(value, 0))
        if field == "model" and fields.by_model and operator in EQUALITY:
            return self._model(operator, value)
        if field in fields.times and operator in ORDER:
            return self._time(field, operator, value)
        known = field in ("state", *fields.times) or field.startswith("labels.") or (field == "model")
        if known and (field != "model" or fields.by_model):
            checks.add("filter", f"{clip(field, 60)} cannot be compared with {operator}")
        else:
            checks.add("filter", f"unknown field {clip(field, 40)!r}; there are {fields.names()}")
        return None

    def _model(self, operator: str, value: str) -> Term | None:
        try:
            project, model_id = parse_name(value, "models", "filter")
        except InvalidFieldsError as error:
            self._checks.violations.extend(error.violations)
            return None
        self._checks.require(self._project in (None, project), "filter", "model is of another project")
        return Term("model", operator, model_id)

    def _time(self, field: str, operator: str, value: str) -> Term | None:
        try:
            moment = datetime.fromisoformat(value)
            if moment.tzinfo is None:
                raise ValueError
            since = moment - _EPOCH
        except (ValueError, OverflowError):
            self._checks.add("filter", f"{field}: {clip(value, 40)!r} is no time such as 2026-11-01T00:00:00Z")
            return None
        return Term(field, operator, max(since // timedelta(microseconds=1), 0))

    def _take(self, kind: str, text: str) -> bool:
        """Whether this comes next; goes past it."""
        match = _TOKEN.match(self._text, self._at)
        if match is None or match[kind] != text:
            return False
        self._at = match.end()
        return True

    def _expect(self, kind: str, text: str) -> None:
        if not self._checks.violations and not self._take(kind, text):
            rest = self._text[self._at :]
            self._checks.add("filter", f"expected {text}, found {clip(rest, 60)!r}" if rest else f"{text} is missing")
