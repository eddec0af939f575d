"""Ids, names and manifest paths."""

from __future__ import annotations

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st
from modelpress_server.errors import InvalidFieldsError
from modelpress_server.names import (
    IdGenerator,
    clashing_path,
    first_id_at,
    format_name,
    new_id,
    parse_name,
    parse_project,
    path_fault,
    time_of_id_us,
)


def test_ids_sort_by_time() -> None:
    """Ids made one after the other are in order, also when the clock goes back."""
    make = IdGenerator()
    ids = [make() for _ in range(1000)]
    assert ids == sorted(set(ids))
    make._last = int(make._last) + (10**9 << 80)  # what a clock far ahead had made
    ahead = make()
    assert make() > ahead


def test_an_id_says_when_it_was_made() -> None:
    """To the millisecond; the smallest id of a time says that time."""
    before_us = time.time_ns() // 1000
    made_us = time_of_id_us(IdGenerator()())
    assert before_us - 1000 <= made_us <= time.time_ns() // 1000
    assert time_of_id_us(first_id_at(1_234_567_000)) == 1_234_567_000


def test_names_round_trip() -> None:
    """What is formatted is parsed."""
    made = new_id()
    assert parse_name(format_name("p-1", "jobs", made), "jobs") == ("p-1", made)
    assert parse_project("projects/default") == "default"


@given(st.text(max_size=80))
def test_arbitrary_text_is_never_a_name(text: str) -> None:
    """Anything else raises InvalidFieldsError and nothing else."""
    for candidate in (text, f"projects/{text}/jobs/{new_id()}", f"projects/p/jobs/{text}"):
        try:
            project, job_id = parse_name(candidate, "jobs")
        except InvalidFieldsError:
            continue
        assert format_name(project, "jobs", job_id) == candidate
        assert project.isascii()
        assert not set(project) & set("./\\\0 ")


@given(st.text(max_size=300))
def test_a_permitted_path_stays_in_its_folder(path: str) -> None:
    """Whatever passes has no part that leads elsewhere."""
    if path_fault(path) is None:
        assert not path.startswith("/")
        assert not {"", ".", ".."} & set(path.split("/"))
        assert "\0" not in path
        assert len(path.encode()) <= 240


@pytest.mark.parametrize(
    ("paths", "clash"),
    [(["a", "b/c", "b/d"], None), (["a", "a"], "a"), (["a", "a/b"], "a/b"), (["a/b", "a"], "a"), ([], None)],
)
def test_clashing_paths(paths: list[str], clash: str | None) -> None:
    """A path may not stand twice, nor be both a file and a folder."""
    assert clashing_path(paths) == clash
