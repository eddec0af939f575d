"""The enum ModelFormat, which is rendered from the engine's table of formats."""

from __future__ import annotations

import re
import textwrap

from modelpress_compression.loaders.formats import FORMATS, Format

COMMON = "modelpress_protos/v1/common.proto"
_ENUM = re.compile(r"(?<=enum ModelFormat \{\n).*?(?=\n\})", re.DOTALL)


def with_formats(common_proto: str) -> str:
    """common.proto with its enum of formats written anew."""
    return _ENUM.sub(lambda _: formats_enum(), common_proto)


def formats_enum() -> str:
    """The values of ModelFormat, each with what it is."""
    values = [("Not known (yet).", "MODEL_FORMAT_UNSPECIFIED", 0)]
    values += [(_comment(row), row.proto_name, row.number) for row in sorted(FORMATS, key=lambda row: row.number)]
    return "\n".join(f"{_wrapped(comment)}\n  {name} = {number};" for comment, name, number in values)


def _comment(row: Format) -> str:
    if row.way_out:
        return f"{row.summary} Refused by servers; converted on the client's machine with {row.way_out.option}."
    return f"{row.summary} Code-bearing: read by confined workers only." if row.carries_code else row.summary


def _wrapped(comment: str) -> str:
    return textwrap.fill(comment, 120, initial_indent="  // ", subsequent_indent="  // ", break_on_hyphens=False)
