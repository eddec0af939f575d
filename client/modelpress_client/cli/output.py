"""What a command writes: data to stdout, progress and hints to stderr."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TextIO

from modelpress_client.cli.units import LAYOUT

if TYPE_CHECKING:
    from rich.console import Console

PIPED_WIDTH = 120  # columns of tables that do not go to a terminal
MAX_WIDTH = 120


class Output:
    """The two streams of one command."""

    def __init__(self, *, as_json: bool, quiet: bool) -> None:
        self.as_json = as_json
        self.quiet = quiet

    def data(self, text: str) -> None:
        """Data as text, unless the command answers with JSON."""
        if not self.as_json:
            write(sys.stdout, text)

    def document(self, document: Any) -> None:
        """The one JSON document, when the command answers with JSON."""
        if self.as_json:
            write(sys.stdout, json_text(document))

    def hint(self, text: str) -> None:
        """A remark for people."""
        if not self.quiet:
            write(sys.stderr, text)

    def error(self, text: str) -> None:
        """What went wrong; never quiet."""
        write(sys.stderr, f"Error: {text}")

    def show(self, render: Callable[[Console], None]) -> None:
        """A table, unless the command answers with JSON."""
        if self.as_json:
            return
        if sys.stdout.isatty():
            render(_console(sys.stdout))
            return
        buffer = io.StringIO()
        render(_console(buffer))
        # Padding is for terminals; whoever greps or diffs the text is better off without.
        write(sys.stdout, "\n".join(line.rstrip() for line in buffer.getvalue().rstrip("\n").split("\n")))


def stderr_console() -> Console:
    """A console on stderr for progress."""
    return _console(sys.stderr)


def _console(stream: TextIO) -> Console:
    from modelpress_client.cli.safe_console import SafeConsole

    console = SafeConsole(file=stream, highlight=False, soft_wrap=False)
    console.width = min(console.width, MAX_WIDTH) if stream.isatty() else PIPED_WIDTH
    return console


def json_text(document: Any) -> str:
    """The document as JSON that is as safe on a terminal as it is true: what cannot be printed is escaped."""
    text = json.dumps(document, indent=2, ensure_ascii=False)
    return "".join(char if char == "\n" or char.isprintable() else json.dumps(char)[1:-1] for char in text)


def write(stream: TextIO, text: str) -> None:
    """Lines of text; whatever of them a server or a model brought, it stays text."""
    from modelpress_protos.printable import printable

    text = printable(text, keep=LAYOUT)
    # A name on the server may have characters that this terminal cannot show.
    encoding = getattr(stream, "encoding", None) or "utf-8"
    print(text.encode(encoding, "backslashreplace").decode(encoding), file=stream, flush=True)
