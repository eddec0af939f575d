"""The folder of our .proto files is all that a client in another language needs."""

from __future__ import annotations

import re
from importlib.resources import files
from pathlib import Path

import modelpress_protos
from google.protobuf import descriptor_pb2
from google.rpc import error_details_pb2, status_pb2
from grpc_tools import protoc

FOLDER = Path(modelpress_protos.__file__).parent
THIRD_PARTY = FOLDER / "third_party"


def test_every_import_is_there() -> None:
    """With the two folders of docs/api.md; google/protobuf/ comes with every implementation."""
    sources = [path for path in FOLDER.rglob("*.proto") if "internal" not in path.parts]
    imports = {name for path in sources for name in re.findall(r'^import "(.+)";', path.read_text(), re.MULTILINE)}
    assert "google/rpc/status.proto" in imports
    for name in imports:
        found = [root / name for root in (FOLDER.parent, THIRD_PARTY) if (root / name).is_file()]
        assert name.startswith("google/protobuf/") or found, name


def test_files_of_others_are_as_their_owners_have_them(tmp_path: Path) -> None:
    """Same messages and numbers as in googleapis-common-protos, which the Python stubs stand on."""
    target = tmp_path / "set"
    include = [f"-I{THIRD_PARTY}", f"-I{files('grpc_tools') / '_proto'}"]
    names = ["google/rpc/status.proto", "google/rpc/error_details.proto"]
    assert protoc.main(["protoc", *include, f"--descriptor_set_out={target}", *names]) == 0
    compiled = {file.name: file for file in descriptor_pb2.FileDescriptorSet.FromString(target.read_bytes()).file}
    for name, module in zip(names, (status_pb2, error_details_pb2), strict=True):
        theirs = descriptor_pb2.FileDescriptorProto.FromString(module.DESCRIPTOR.serialized_pb)
        ours = descriptor_pb2.FileDescriptorProto.FromString(compiled[name].SerializeToString())
        _forget_json_names(ours.message_type)
        _forget_json_names(theirs.message_type)
        assert ours == theirs


def _forget_json_names(messages: object) -> None:
    for message in messages:  # type: ignore[attr-defined]
        for field in message.field:
            field.ClearField("json_name")
        _forget_json_names(message.nested_type)
