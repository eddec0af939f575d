"""Writes the tables of the README, docs/recipes.md, server.md, cli.md and formats.md from what the code itself says.

    python docs/generate_reference.py            writes them
    python docs/generate_reference.py --check    fails when they are not up to date

A table stands between `<!-- generated: NAME -->` and `<!-- end -->`; everything around it is written by hand.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable, Iterable
from dataclasses import MISSING, fields
from pathlib import Path

import click
from modelpress_client.cli.app import cli
from modelpress_compression.loaders.formats import FORMATS
from modelpress_compression.loaders.formats.refusals import REFUSALS
from modelpress_compression.options import Config, schema_of
from modelpress_compression.passes.distill.config import AUGMENTATIONS
from modelpress_compression.recipe import Benchmark, Constraints, Goal, presets
from modelpress_compression.target import Target
from modelpress_compression.techniques import TECHNIQUES
from modelpress_server.config import GIB, KIB, MIB, Settings

FOLDER = Path(__file__).resolve().parent
PAGES = ("../README.md", "recipes.md", "server.md", "cli.md", "formats.md")
_BLOCK = re.compile(r"(<!-- generated: (?P<name>[\w-]+) -->\n).*?(<!-- end -->)", re.DOTALL)
_MEASURED_ON_THE_MACHINE = {"data_dir": "the user's data directory", "worker_memory_bytes": "4/5 of the machine"}


def table(header: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """A Markdown table, with the pipes of its cells escaped."""
    names = list(header)
    lines = [names, ["---"] * len(names), *([cell.replace("|", "\\|") for cell in row] for row in rows)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def code(text: str) -> str:
    """Text in code style; nothing stays nothing."""
    return f"`{text}`" if text else ""


def options_reference(config: type[Config]) -> str:
    """One row an option of a part of the recipe."""
    rows = (
        (
            code(option.name),
            option.type_text,
            code(option.default_text) or "not set",
            ", ".join(map(code, option.allowed)) or code(option.range_text()),
            option.help,
        )
        for option in schema_of(config).options
    )
    return table(("option", "type", "default", "allowed", "what it does"), rows)


def techniques_reference() -> str:
    """One section a technique."""
    sections = (
        f"### {row.name}\n\n{row.summary}\n\n{options_reference(row.config_class)}" for row in TECHNIQUES.values()
    )
    return "\n" + "\n".join(sections) + "\n"


def augmentations_reference() -> str:
    """One row a change that `distill.augment` can name."""
    options = AUGMENTATIONS.options
    rows = ((code(item.name), code(item.default_text), code(item.range_text()), item.help) for item in options)
    return table(("augmentation", "default", "allowed", "what it does"), rows)


def presets_reference() -> str:
    """One row a preset."""
    return table(("preset", "what it is good for"), ((code(name), text) for name, text in presets().items()))


def formats_reference() -> str:
    """One row a format."""
    rows = (
        (
            row.summary.removesuffix("."),
            f"with `{row.way_out.option}`, converted on your machine" if row.way_out else "sent as it is",
        )
        for row in sorted(FORMATS, key=lambda row: row.number)
    )
    return table(("file", "how"), rows)


def refusals_reference() -> str:
    """One row a refusal; what a message fills in stands in angle brackets."""
    rows = (
        (_filled(f"{row.what} {row.lacks}".strip()), _filled(row.works), code(row.code)) for row in REFUSALS.values()
    )
    return table(("what it is, and what is lacking here", "what works", "`finding`"), rows)


def _filled(text: str) -> str:
    return re.sub(r"\{(\w+)(?:!r)?\}", lambda field: f"&lt;{field[1]}&gt;", text)


def settings_reference() -> str:
    """One row a setting of the server; its environment variable and its TOML key follow from its name."""
    rows = []
    for item in fields(Settings):
        kind = item.metadata["kind"]
        option = f"--{item.name.replace('_', '-')}"
        default = _MEASURED_ON_THE_MACHINE.get(item.name)
        if default is None:
            default = "not set" if item.default in (None, MISSING) else code(_amount(item.default, kind))
        choices = ", ".join(map(code, item.metadata["choices"]))
        rows.append((code(option), default, item.metadata["help"] + (f" One of {choices}." if choices else "")))
    return table(("option", "default", "what it sets"), rows)


def _amount(value: object, kind: str) -> str:
    if isinstance(value, bool):
        return "on" if value else "off"
    if kind == "bytes" and isinstance(value, int):
        for unit, name in ((GIB, "GiB"), (MIB, "MiB"), (KIB, "KiB")):
            if value >= unit and value % unit == 0:
                return f"{value // unit} {name}"
    if kind == "seconds" and isinstance(value, float):
        for unit_s, name in ((86400, "d"), (3600, "h")):
            if value % unit_s == 0:
                return f"{value / unit_s:g} {name}"
        return f"{value:g} s"
    return str(value)


def commands_reference() -> str:
    """One row a command of compress-client."""
    context = click.Context(cli, info_name="compress-client")
    rows = []
    for name in cli.list_commands(context):
        command = cli.get_command(context, name)
        if command is None or command.hidden:
            continue
        usage = " ".join([name, *(str(part.make_metavar(context)) for part in command.params if _is_argument(part))])
        rows.append((code(usage), command.get_short_help_str(limit=200)))
    return table(("command", "what it does"), rows)


def _is_argument(parameter: click.Parameter) -> bool:
    return isinstance(parameter, click.Argument)


def client_options_reference(name: str) -> str:
    """One row an option of a command, without those that all have; those for an empty name."""
    context = click.Context(cli, info_name="compress-client")
    command: click.Command | None = cli.get_command(context, name) if name else cli
    if command is None:
        raise SystemExit(f"compress-client has no command {name!r}; docs/generate_reference.py names one that is gone")
    shared = {parameter.name for parameter in cli.params} if name else set()
    rows = []
    for parameter in command.params:
        if isinstance(parameter, click.Option) and not parameter.hidden and parameter.name not in shared:
            record = parameter.get_help_record(context)
            if record is not None:
                rows.append((code(record[0]), " ".join(record[1].split())))
    return table(("option", "what it does"), rows)


REFERENCES: dict[str, Callable[[], str]] = {
    "techniques": techniques_reference,
    "augmentations": augmentations_reference,
    "goal": lambda: options_reference(Goal),
    "target": lambda: options_reference(Target),
    "constraints": lambda: options_reference(Constraints),
    "benchmark": lambda: options_reference(Benchmark),
    "presets": presets_reference,
    "formats": formats_reference,
    "refusals": refusals_reference,
    "settings": settings_reference,
    "commands": commands_reference,
    "client-options": lambda: client_options_reference(""),
    "upload-options": lambda: client_options_reference("upload"),
}


def render(text: str) -> str:
    """A page with its tables written anew."""
    return _BLOCK.sub(lambda block: f"{block[1]}{REFERENCES[block['name']]()}{block[3]}", text)


def main() -> int:
    parser = argparse.ArgumentParser(description="Writes the tables of the reference pages.")
    parser.add_argument("--check", action="store_true", help="compare with what is there instead of writing")
    arguments = parser.parse_args()
    stale = []
    for name in PAGES:
        page = FOLDER / name
        text = page.read_text("utf-8")
        fresh = render(text)
        if fresh != text:
            stale.append(name)
            if not arguments.check:
                page.write_text(fresh, "utf-8")
    if arguments.check and stale:
        print(f"docs: {', '.join(stale)} out of date; run python docs/generate_reference.py", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
