"""Checks of request messages: every violation at once, each with its path."""

from __future__ import annotations

import hashlib
import re
import uuid
from collections.abc import Collection, Iterable, Mapping

from google.protobuf.field_mask_pb2 import FieldMask
from google.protobuf.message import Message
from modelpress_protos.v1 import common_pb2, model_service_pb2

from modelpress_server.errors import FieldViolation, InvalidFieldsError
from modelpress_server.names import clashing_path, path_fault
from modelpress_server.stores.blobs import BlobKey
from modelpress_server.stores.queries import RequestKey

MAX_FILES = 1000
MAX_DIGESTS = 1000
MAX_LABELS = 64
MAX_DISPLAY_NAME_CHARS = 255
MAX_HINTS = 1000
MAX_RANK = 32
# A full manifest with long paths, and room for hints; a page of a list must fit a gRPC message.
MAX_MODEL_BYTES = 512 * 1024
DEFAULT_PAGE_SIZE = 50
MAX_PAGE_SIZE = 1000

_LABEL_KEY = re.compile(r"[a-z0-9_.-]{1,63}")
_DTYPE = re.compile(r"[a-z][a-z0-9_]{0,31}")


def update_paths(given: Message, mask: FieldMask, mutable: Collection[str], checks: Checks) -> set[str]:
    """The fields that an update changes (AIP-134): those of the mask; `*`: all; an empty mask: those that are set."""
    paths = set(mask.paths)
    if paths == {"*"}:
        return set(mutable)
    for path in sorted(paths - set(mutable)):
        checks.add("update_mask", f"{path!r} cannot be changed; only {' and '.join(mutable)} can")
    return paths or {name for name in mutable if getattr(given, name)}


class Checks:
    """Collects violations; `finish` raises them all."""

    def __init__(self) -> None:
        self.violations: list[FieldViolation] = []

    def add(self, field: str, description: str) -> None:
        """Notes a violation."""
        self.violations.append(FieldViolation(field, description))

    def require(self, holds: bool, field: str, description: str) -> None:
        """Notes a violation unless `holds`."""
        if not holds:
            self.add(field, description)

    def finish(self) -> None:
        """Raises InvalidFieldsError where anything was noted."""
        if self.violations:
            raise InvalidFieldsError(self.violations)

    def digest(self, field: str, digest: common_pb2.Digest) -> None:
        """A digest names 32 bytes and a length."""
        self.require(len(digest.sha256) == 32, f"{field}.sha256", f"has {len(digest.sha256)} bytes, not 32")
        self.require(digest.size_bytes >= 0, f"{field}.size_bytes", f"{digest.size_bytes} is negative")

    def text(self, field: str, value: str, max_chars: int) -> None:
        """A text for people: short and printable."""
        self.require(len(value) <= max_chars, field, f"has {len(value)} characters; at most {max_chars} are allowed")
        self.require(value.isprintable(), field, "contains a control character")

    def labels(self, field: str, values: Mapping[str, str]) -> None:
        """Labels as both models and jobs carry them."""
        self.require(len(values) <= MAX_LABELS, field, f"has {len(values)} labels; at most {MAX_LABELS} are allowed")
        for key, value in sorted(values.items())[:MAX_LABELS]:
            if not _LABEL_KEY.fullmatch(key):
                self.add(f"{field}[{key[:63]!r}]", "the key is not 1 to 63 characters [a-z0-9_.-]")
            else:
                self.text(f"{field}[{key!r}]", value, 255)

    def manifest(self, field: str, files: Iterable[common_pb2.FileEntry], max_blob_bytes: int) -> None:
        """The files of a model."""
        entries = list(files)
        self.require(bool(entries), field, "is empty; a model has at least one file")
        self.require(len(entries) <= MAX_FILES, field, f"has {len(entries)} files; at most {MAX_FILES} are allowed")
        for index, entry in enumerate(entries[:MAX_FILES]):
            fault = path_fault(entry.path)
            self.require(fault is None, f"{field}[{index}].path", fault or "")
            self.digest(f"{field}[{index}].digest", entry.digest)
            too_large = entry.digest.size_bytes > max_blob_bytes
            self.require(not too_large, f"{field}[{index}].digest.size_bytes", f"is over {max_blob_bytes}")
        clash = clashing_path(entry.path for entry in entries[:MAX_FILES])
        self.require(clash is None, field, f"{clash!r} stands twice, or is both a file and a folder")

    def input_hints(self, field: str, hints: Iterable[common_pb2.TensorSpec]) -> None:
        """What the user said of the inputs; whether it fits the model, the worker finds out."""
        entries = list(hints)
        self.require(len(entries) <= MAX_HINTS, field, f"has {len(entries)} entries; at most {MAX_HINTS} are allowed")
        names = [hint.name for hint in entries]
        self.require(len(set(names)) == len(names), field, "names an input twice")
        for index, hint in enumerate(entries[:MAX_HINTS]):
            path = f"{field}[{index}]"
            self.text(f"{path}.name", hint.name, 255)
            self.require(bool(_DTYPE.fullmatch(hint.dtype)), f"{path}.dtype", "is not a type such as float32")
            self.require(len(hint.shape) <= MAX_RANK, f"{path}.shape", f"has more than {MAX_RANK} dimensions")
            for axis, dim in enumerate(hint.shape[:MAX_RANK]):
                self.require(dim.value >= 0, f"{path}.shape[{axis}]", f"{dim.value} is negative")
                self.text(f"{path}.shape[{axis}]", dim.symbol, 63)


def check_model(model: model_service_pb2.Model, max_blob_bytes: int) -> Checks:
    """Checks what a client sends of a new model."""
    checks = Checks()
    size_bytes = model.ByteSize()
    checks.require(
        size_bytes <= MAX_MODEL_BYTES, "model", f"has {size_bytes} bytes; at most {MAX_MODEL_BYTES} are allowed"
    )
    checks.manifest("model.files", model.files, max_blob_bytes)
    checks.text("model.display_name", model.display_name, MAX_DISPLAY_NAME_CHARS)
    checks.input_hints("model.input_hints", model.input_hints)
    checks.labels("model.labels", model.labels)
    if model.HasField("source"):
        checks.digest("model.source.digest", model.source.digest)
    return checks


def check_digests(field: str, digests: Iterable[common_pb2.Digest]) -> list[BlobKey]:
    """Up to 1,000 well-formed digests. Raises InvalidFieldsError."""
    checks = Checks()
    entries = list(digests)
    if len(entries) > MAX_DIGESTS:
        checks.add(field, f"has {len(entries)} entries; at most {MAX_DIGESTS} are allowed")
        checks.finish()
    for index, digest in enumerate(entries):
        checks.digest(f"{field}[{index}]", digest)
    checks.finish()
    return [BlobKey.of(digest) for digest in entries]


def check_digest(field: str, digest: common_pb2.Digest) -> BlobKey:
    """One well-formed digest. Raises InvalidFieldsError."""
    checks = Checks()
    checks.digest(field, digest)
    checks.finish()
    return BlobKey.of(digest)


def request_key(request_id: str, payload: Message, checks: Checks) -> RequestKey | None:
    """The request id with the hash of its payload; None: the client gave none."""
    if not request_id:
        return None
    try:
        canonical = str(uuid.UUID(request_id))
    except ValueError:
        checks.add("request_id", "is not a UUID")
        return None
    return RequestKey(canonical, message_hash(payload))


def message_hash(*messages: Message | bytes) -> bytes:
    """SHA-256 over messages; the same content gives the same hash, whatever the order of its maps."""
    sha256 = hashlib.sha256()
    for message in messages:
        data = message if isinstance(message, bytes) else message.SerializeToString(deterministic=True)
        sha256.update(len(data).to_bytes(8, "big") + data)
    return sha256.digest()
