"""Commands to copy: they go on from what this call was given, to the same server."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Mapping, Sequence

import click

PROGRAM = "compress-client"
_KEY = "modelpress.given"
# Of a call to a server; its token is never shown.
_SERVER = ("--server", "--local", "--data-dir", "--ca", "--cert", "--key")
# What advice changes, and the limits, which it names where they are to hold.
_CHANGED = ("--goal", "--search-time")
_LIMITS = ("--max-drop", "--max-size", "--min-ratio", "--max-latency", "--min-speedup")
# For one call alone, or not for everyone to see.
_ONCE = ("--token", "--timeout", "--json", "--quiet", "--skip-cache")

Given = Mapping[str, Sequence[str]]


def remember(command: click.Command, context: click.Context, arguments: Sequence[str]) -> None:
    """Notes the options as they are spelled, those of the command after those of the group."""
    values, _, order = command.make_parser(context).parse_args(list(arguments))
    noted = context.meta.setdefault(_KEY, {})
    for option in dict.fromkeys(item for item in order if isinstance(item, click.Option)):
        value = values[option.name]
        name = next(spelled for spelled in option.opts if spelled.startswith("--"))
        noted[name] = () if option.is_flag else tuple(value) if option.multiple else (value,)


def given(context: click.Context) -> Given:
    """The options of this call, by their long names; a flag has no values."""
    return dict(context.meta.get(_KEY, {}))


def command(options: Given, *words: str) -> str:
    """`compress-client WORDS`, for the server of this call."""
    return shlex.join([PROGRAM, *words, *_spelled(options, _SERVER)])


def advised(options: Given, words: Sequence[str], advice: str) -> str:
    """The command of an advice with what this call was given: its files, its server, and whatever else it said.

    words: of this call, as `upload` and the path. advice: `compress-client upload MODEL`, and options with one value
    each; a file that this call has no option for stays a word to fill in.
    """
    told = shlex.split(advice)[3:]
    pairs = dict(zip(told[::2], told[1::2], strict=True))
    left_out = {*_CHANGED, *_ONCE, *(name for name in _LIMITS if name not in pairs)}
    kept = {name: values for name, values in options.items() if name not in left_out}
    # An override would win over the goal that is advised.
    if overrides := [text for text in kept.pop("--set", ()) if not text.startswith("goal.")]:
        kept["--set"] = overrides
    added = [word for name, value in pairs.items() if name not in kept for word in (name, value)]
    return shlex.join([PROGRAM, *words, *_spelled(kept, kept), *added])


def _spelled(options: Given, names: Iterable[str]) -> list[str]:
    words = []
    for name in names:
        if name in options:
            words += [word for value in options[name] for word in (name, value)] or [name]
    return words
