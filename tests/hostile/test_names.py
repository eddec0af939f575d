"""Names that steer a terminal, turn text around, or forge markup: seen by nobody as anything but text."""

from __future__ import annotations

import io
import json
import logging
import sys
from dataclasses import dataclass
from typing import Any

import pytest
from google.rpc import error_details_pb2
from modelpress_client.cli.output import Output, json_text
from modelpress_client.cli.report_markdown import to_markdown
from modelpress_client.cli.report_text import print_report
from modelpress_client.cli.safe_console import SafeConsole
from modelpress_client.report import Report
from modelpress_compression import Recipe, compress, load
from modelpress_compression.errors import RejectedModelError
from modelpress_server.logs import PrintableFormatter
from modelpress_server.worker.failures import status_of_exception
from modelpress_server.worker.paths import Redactor
from onnx_files import EVIL, hostile_names

LAYOUT = "\n\t\u00a0"


def is_safe(text: str) -> bool:
    return all(char.isprintable() or char in LAYOUT for char in text)


@dataclass(frozen=True)
class Made:
    """What a job on the hostile model leaves."""

    document: dict[str, Any]
    html: str


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """The default goal, which names layers in its steps, candidates and advice."""
    folder = tmp_path_factory.mktemp("names")
    recipe = Recipe.from_dict({"version": 1, "goal": {"objective": "balanced"}, "benchmark": {"rounds": 5}})
    result = compress(load(hostile_names(folder / "m.onnx")), recipe)
    result.write(folder)
    (html,) = folder.glob("*.html")
    assert any(name.startswith(EVIL) for name in result.report["fidelity"]["outputs"])
    return Made(result.report, html.read_text("utf-8"))


def test_the_page(made: Made) -> None:
    """The HTML report has neither markup nor control characters of the model's author."""
    assert is_safe(made.html)
    assert "<script>alert" not in made.html
    assert "<img" not in made.html
    assert r"\x1b[31mRED" in made.html


@pytest.mark.parametrize("terminal", [True, False])
def test_the_terminal(made: Made, terminal: bool) -> None:
    """The client's own styles are the only sequences that reach a terminal."""
    stream = io.StringIO()
    console = SafeConsole(file=stream, force_terminal=terminal, color_system="standard" if terminal else None, width=99)
    print_report(console, Report.from_dict(made.document))
    text = stream.getvalue()
    assert "RED" in text
    assert "\x1b]0;" not in text
    assert not set("\x07\x9b\u202e\r") & set(text)
    assert terminal or is_safe(text)


def test_markdown_and_json(made: Made) -> None:
    """Markdown shows the names; JSON holds them, escaped in its own way."""
    markdown, document = to_markdown(Report.from_dict(made.document)), json_text(made.document)
    assert is_safe(markdown)
    assert is_safe(document)
    assert json.loads(document) == json.loads(json.dumps(made.document))


def test_everything_else_that_the_client_writes(capsys: pytest.CaptureFixture[str]) -> None:
    """Data, hints and errors pass through the same place."""
    out = Output(as_json=False, quiet=False)
    out.data(EVIL)
    out.hint(EVIL)
    out.error(EVIL)
    seen = capsys.readouterr()
    assert is_safe(seen.out)
    assert is_safe(seen.err)


def test_errors_of_the_server() -> None:
    """Message and details of a status are printable, whoever named what they name."""
    status = status_of_exception(RejectedModelError(f"Node {EVIL!s}: refused.", finding=EVIL), Redactor([]))
    info = error_details_pb2.ErrorInfo()
    assert status.details[0].Unpack(info)
    assert status.message.isprintable()
    assert info.metadata["finding"].isprintable()


def test_the_log_of_the_server() -> None:
    """A name cannot begin a line of its own in the log, in a traceback neither."""
    try:
        raise ValueError(EVIL)
    except ValueError:
        failure = sys.exc_info()
    record = logging.LogRecord("a", logging.ERROR, "", 0, "model %s refused", (EVIL,), failure)
    first, *traceback = PrintableFormatter().format(record).split("\n")
    assert first.endswith("refused")
    assert r"\x1b[31mRED" in first
    assert first.isprintable()
    assert all(line.isprintable() for line in traceback)
