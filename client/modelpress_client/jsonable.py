"""Messages as JSON values for people and scripts.

Unlike protobuf's own JSON: 64-bit integers are numbers, enum values have no prefix (`SUCCEEDED`), digests are hex, and
recipes have the shape of their YAML.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, cast

from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import Message
from google.protobuf.timestamp_pb2 import Timestamp
from google.rpc import code_pb2
from google.rpc.status_pb2 import Status
from modelpress_protos import recipe
from modelpress_protos.v1.common_pb2 import TensorSpec
from modelpress_protos.v1.recipe_pb2 import Recipe

from modelpress_client.errors import status_details
from modelpress_client.inputs import format_input

if TYPE_CHECKING:
    from modelpress_protos.recipe import Field


def to_json(message: Message) -> dict[str, Any]:
    """A JSON object with every field that is set."""
    document: dict[str, Any] = {}
    for field, value in message.ListFields():
        if field.message_type is not None and field.message_type.GetOptions().map_entry:
            document[field.name] = {str(key): _value(field, value[key]) for key in sorted(value)}
        elif field.is_repeated:
            document[field.name] = [_value(field, item) for item in value]
        else:
            document[field.name] = _value(field, value)
    return document


def enum_name(enum: Any, value: int, prefix: str) -> str:
    """`SUCCEEDED` for JOB_STATE_SUCCEEDED; the number for a value that this client does not know."""
    return str(enum.Name(value)).removeprefix(prefix) if value in enum.values() else str(value)


def _status(status: Status) -> dict[str, Any]:
    details = status_details(status)
    known = status.code in code_pb2.Code.values()
    code = code_pb2.Code.Name(cast(Any, status.code)) if known else str(status.code)
    return {"code": code, "reason": details.reason, "message": status.message, "details": details.metadata}


_SPECIAL: dict[Any, Callable[[Any], Any]] = {
    Timestamp: lambda message: message.ToJsonString(),
    Duration: lambda message: message.ToTimedelta().total_seconds(),
    Recipe: recipe.to_dict,
    Status: _status,
    TensorSpec: format_input,
}


def _value(field: Field, value: Any) -> Any:
    if isinstance(value, Message):
        convert: Callable[[Any], Any] = _SPECIAL.get(type(value), to_json)
        return convert(value)
    if field.enum_type is not None:
        entry = field.enum_type.values_by_number.get(value)
        return str(value) if entry is None else entry.name.removeprefix(_enum_prefix(field.enum_type.name))
    return value.hex() if isinstance(value, bytes) else value


def _enum_prefix(name: str) -> str:
    """`JOB_STATE_` for JobState."""
    return "".join(f"_{letter}" if letter.isupper() else letter.upper() for letter in name).lstrip("_") + "_"
