"""Text of strangers, made safe to look at.

Names in a model are its author's. An escape sequence among them moves a terminal's cursor or sets its title, a
bidirectional mark turns the text around it, a line break forges a line of a log. So whatever goes to a terminal, a
page, a log or an error passes through here.
"""

from __future__ import annotations

import re

_SUSPECT = re.compile(r"[^\x20-\x7e]")


def printable(text: str, keep: str = "") -> str:
    """The text with everything that is not printable written out: `\\x1b`, `\\u202e`; `keep`: characters that stay.

    Control and format characters, separators other than the space, surrogates and unassigned characters are not
    printable. Done twice it does no more than done once.
    """

    def written_out(match: re.Match[str]) -> str:
        char = match[0]
        return char if char.isprintable() or char in keep else ascii(char)[1:-1]

    return _SUSPECT.sub(written_out, text)
