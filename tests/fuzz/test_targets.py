"""A short run of each target; `run.py` is for longer ones."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from targets import TARGETS, upload_server

EXAMPLES = 60


@pytest.fixture(scope="module", autouse=True)
def _server() -> Iterator[None]:
    yield
    if upload_server.cache_info().currsize:
        upload_server().close()


@pytest.mark.parametrize("name", TARGETS)
@settings(max_examples=EXAMPLES)
@given(data=st.data())
def test_nothing_but_typed_refusals(name: str, data: st.DataObject) -> None:
    """Whatever is drawn is read, or refused with an error of ours."""
    TARGETS[name].run(data.draw(TARGETS[name].values))
