"""Writes docs/api_reference.md from the .proto files: every method, message and enum, with what their comments say.

python docs/generate_api.py            writes it
python docs/generate_api.py --check    fails when it is not up to date
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from importlib.resources import files
from pathlib import Path

from google.protobuf.descriptor_pb2 import (
    DescriptorProto,
    EnumDescriptorProto,
    FieldDescriptorProto,
    FileDescriptorProto,
    FileDescriptorSet,
    MethodDescriptorProto,
)

PROTOS = Path(__file__).resolve().parents[1] / "protos"
PAGE = Path(__file__).resolve().parent / "api_reference.md"
# In the order of a job's way; recipe.proto has a page of its own.
FILES = ("upload_service", "model_service", "job_service", "server_service", "common")
PACKAGE = ".modelpress.v1."
HEAD = """# Reference of the gRPC API

Package `modelpress.v1`, written by `docs/generate_api.py` from the comments of the `.proto` files.
[api.md](api.md) says how to call it; [recipes.md](recipes.md) has the recipe.
"""
# Numbers of fields in descriptor.proto, of which a path to a comment is made.
MESSAGE, ENUM, SERVICE, FIELD, NESTED, NESTED_ENUM, VALUE, METHOD = 4, 5, 6, 2, 3, 4, 2, 2
_SCALARS = {
    number: name.removeprefix("TYPE_").lower()
    for name, number in FieldDescriptorProto.Type.items()
    if name != "TYPE_GROUP"
}
Comments = Mapping[tuple[int, ...], str]


def descriptors() -> dict[str, FileDescriptorProto]:
    """The files, with their comments, by name."""
    from grpc_tools import protoc

    names = [f"modelpress_protos/v1/{name}.proto" for name in FILES]
    include = [f"-I{PROTOS}", f"-I{files('grpc_tools') / '_proto'}", f"-I{PROTOS / 'modelpress_protos/third_party'}"]
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "set.binpb"
        if protoc.main(["protoc", *include, f"--descriptor_set_out={output}", "--include_source_info", *names]) != 0:
            raise SystemExit("protoc failed")
        found = FileDescriptorSet.FromString(output.read_bytes())
    return {Path(file.name).stem: file for file in found.file}


def page() -> str:
    """The whole page."""
    parts = [HEAD]
    for name, file in descriptors().items():
        comments = {tuple(one.path): one.leading_comments.strip() for one in file.source_code_info.location}
        parts += services(file, comments)
        title = f"Messages of {name}.proto" if file.service else f"{name}.proto"
        parts.append(f"## {title}\n")
        for index, enum in enumerate(file.enum_type):
            parts.append(enum_section(enum, comments, (ENUM, index), ""))
        for index, message in enumerate(file.message_type):
            parts += message_sections(message, comments, (MESSAGE, index), "")
    return "\n".join(parts)


def services(file: FileDescriptorProto, comments: Comments) -> Iterator[str]:
    """A section a service, and one a method."""
    for index, service in enumerate(file.service):
        yield f"## {service.name}\n\n{prose(comments[SERVICE, index])}\n"
        for place, method in enumerate(service.method):
            yield f"### {method.name}\n\n{signature(method)}\n\n{prose(comments[SERVICE, index, METHOD, place])}\n"


def signature(method: MethodDescriptorProto) -> str:
    """What goes in and out."""
    given, returned = (type_text(name) for name in (method.input_type, method.output_type))
    streams = "stream of " if method.client_streaming else ""
    return f"{streams}{given} → {'stream of ' if method.server_streaming else ''}{returned}"


def message_sections(message: DescriptorProto, comments: Comments, path: tuple[int, ...], within: str) -> Iterator[str]:
    """A section a message, and those within it."""
    name = within + message.name
    rows = [
        (f"`{field.name}`", field_type(message, field), prose(comments.get((*path, FIELD, index), ""), " "))
        for index, field in enumerate(message.field)
    ]
    table = rows_text(("field", "type", "what"), rows) if rows else ""
    yield f"### {name}\n\n{prose(comments.get(path, ''))}\n\n{table}".rstrip("\n") + "\n"
    for index, enum in enumerate(message.enum_type):
        yield enum_section(enum, comments, (*path, NESTED_ENUM, index), f"{name}.")
    for index, nested in enumerate(message.nested_type):
        if not nested.options.map_entry:
            yield from message_sections(nested, comments, (*path, NESTED, index), f"{name}.")


def enum_section(enum: EnumDescriptorProto, comments: Comments, path: tuple[int, ...], within: str) -> str:
    """A section of an enum."""
    rows = [
        (f"`{value.name}`", str(value.number), prose(comments.get((*path, VALUE, index), ""), " "))
        for index, value in enumerate(enum.value)
    ]
    table = rows_text(("value", "number", "what"), rows)
    return f"### {within}{enum.name}\n\n{prose(comments.get(path, ''))}\n\n{table}"


def field_type(message: DescriptorProto, field: FieldDescriptorProto) -> str:
    """`repeated [Digest](#digest)`, `map<string, string>`, and in which oneof it is."""
    entry = next(
        (one for one in message.nested_type if one.options.map_entry and field.type_name.endswith(f".{one.name}")), None
    )
    if entry is not None:
        key, value = entry.field
        return f"map of {field_type(entry, key)} to {field_type(entry, value)}"
    text = type_text(field.type_name) if field.type_name else _SCALARS[field.type]
    if field.label == FieldDescriptorProto.LABEL_REPEATED:
        return f"repeated {text}"
    if field.proto3_optional:
        return f"optional {text}"
    if field.HasField("oneof_index"):
        return f"{text}, one of `{message.oneof_decl[field.oneof_index].name}`"
    return text


def type_text(name: str) -> str:
    """A link to a section, or the full name of a type of others."""
    if not name.startswith(PACKAGE):
        return f"`{name.removeprefix('.')}`"
    short = name.removeprefix(PACKAGE)
    if short == "Recipe":
        return "[Recipe](recipes.md)"
    return f"[{short}](#{short.lower().replace('.', '')})"


def prose(comment: str, joint: str = "\n") -> str:
    """A comment as Markdown."""
    return joint.join(line.strip() for line in comment.splitlines()).replace("<", "&lt;")


def rows_text(header: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """A Markdown table, with the pipes of its cells escaped."""
    names = list(header)
    lines = [names, ["---"] * len(names), *([cell.replace("|", "\\|") for cell in row] for row in rows)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def main() -> int:
    parser = argparse.ArgumentParser(description="Writes docs/api_reference.md.")
    parser.add_argument("--check", action="store_true", help="compare with what is there instead of writing")
    arguments = parser.parse_args()
    fresh = page()
    if not arguments.check:
        PAGE.write_text(fresh, "utf-8")
        return 0
    if not PAGE.exists() or PAGE.read_text("utf-8") != fresh:
        print("docs/api_reference.md is out of date; run python docs/generate_api.py", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
