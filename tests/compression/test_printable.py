"""Text of strangers is shown, and does nothing."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from modelpress_compression.printable import printable


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("conv_1/weight", "conv_1/weight"),
        ("größe 重み", "größe 重み"),
        ("\x1b[31mred\x1b]0;title\x07", r"\x1b[31mred\x1b]0;title\x07"),
        ("\x9b31m", r"\x9b31m"),
        ("a\u202egnp.exe", r"a\u202egnp.exe"),
        ("one\ntwo\r\x00", r"one\ntwo\r\x00"),
        ("\u2028\ufeff\U000e0041\ud800", r"\u2028\ufeff\U000e0041\ud800"),
    ],
)
def test_what_is_not_printable_is_written_out(text: str, shown: str) -> None:
    """Letters of every script stay; controls, marks that turn text around, and breaks of lines do not."""
    assert printable(text) == shown


def test_what_is_kept() -> None:
    """Layout of our own stays where it is asked for."""
    assert printable("a\nb\x1b", keep="\n") == "a\nb\\x1b"


@given(st.text())
def test_any_text(text: str) -> None:
    """The outcome is printable, and stays as it is when it passes through again."""
    assert printable(text).isprintable()
    assert printable(printable(text)) == printable(text)
