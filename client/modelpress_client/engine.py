"""The engine in a process of its own: this package needs neither torch nor numpy, and a crash there is none here.

`python -m MODULE ...` prints one JSON document, or `{"error": {"reason", "message"}}`.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import json
import os
import signal
import sys
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

from modelpress_client.errors import MissingExtraError, ServerError, UnusableInputError

MAX_SHOWN_CHARS = 2000  # of what a process that broke has printed
_LINE_BYTES = 1024 * 1024  # 1 MiB: longer lines of a user's code are no news


async def run_engine(
    module: str,
    arguments: Sequence[str],
    *,
    doing: str,
    packages: Sequence[str],
    extra: str = "engine",
    broke: str = "ENGINE_BROKE",
    tell: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """The document of the engine's `module`. `doing`: what is done, to begin a sentence ("Converting net.pt").
    `packages`: what must be importable, which modelpress[`extra`] installs. `broke`: the reason where the
    process breaks. `tell`: hears each line of stderr.

    Raises MissingExtraError; UnusableInputError with the engine's words; ServerError where it broke.
    """
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing:
        raise MissingExtraError(
            f"{doing} needs {', '.join(missing)} on this machine. Run: pip install 'modelpress[{extra}]'"
        )
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        *("-m", module, *arguments),
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        limit=_LINE_BYTES,
        start_new_session=True,  # what it starts in turn ends with it
    )
    try:
        output, errors = await asyncio.gather(_all(process.stdout), _told(process.stderr, tell))
        await process.wait()
    finally:
        if process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            await process.wait()
    document = last_json_object(output)
    if document is None or (process.returncode and "error" not in document):
        raise ServerError(
            f"{doing} broke with exit code {process.returncode}. It printed:\n{errors or '(nothing)'}",
            reason=broke,
        )
    if "error" in document:
        error = document["error"]
        raise UnusableInputError(
            f"{doing} failed: {error.get('message', 'no message')}", reason=str(error.get("reason", ""))
        )
    return document


async def _all(stream: asyncio.StreamReader | None) -> str:
    return "" if stream is None else (await stream.read()).decode(errors="replace")


async def _told(stream: asyncio.StreamReader | None, tell: Callable[[str], None] | None) -> str:
    """The end of what is printed; each line is told as it comes."""
    kept: deque[str] = deque(maxlen=100)
    while stream is not None:
        try:
            line = await stream.readline()
        except ValueError:  # too long a line
            continue
        if not line:
            break
        text = line.decode(errors="replace").rstrip()
        kept.append(text)
        if tell is not None and text:
            tell(text)
    return "\n".join(kept).strip()[-MAX_SHOWN_CHARS:]


def last_json_object(text: str) -> dict[str, Any] | None:
    """A user's own code may print; the document is the last line, or everything."""
    for candidate in (text.strip().rsplit("\n", 1)[-1], text):
        try:
            document = json.loads(candidate)
        except ValueError:
            continue
        if isinstance(document, dict):
            return document
    return None
