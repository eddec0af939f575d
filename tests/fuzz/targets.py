"""What is fuzzed: each target takes drawn values, and raises where something other than a typed refusal comes out."""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import io
import os
import random
import shutil
import struct
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import google_crc32c
import grpc.aio
import onnx
import yaml
from hypothesis import strategies as st
from modelpress_client.errors import ModelpressError
from modelpress_client.recipes import load_yaml
from modelpress_compression.archive import Archive
from modelpress_compression.errors import CompressionError
from modelpress_compression.inputs import InputData
from modelpress_compression.loaders.checked_copy import write_copy
from modelpress_compression.loaders.formats import FORMATS, detect
from modelpress_compression.loaders.formats.pickle_scan import scan_pickle
from modelpress_compression.loaders.onnx_check import check_external_data, check_graph, check_operators
from modelpress_compression.loaders.source import Source
from modelpress_compression.recipe import Recipe
from modelpress_compression.specs import TensorSpec
from modelpress_protos import recipe as language
from modelpress_protos.errors import CompressionError as RecipeError
from modelpress_protos.v1 import upload_service_pb2
from modelpress_server.app import Server
from modelpress_server.config import Settings
from modelpress_server.errors import ServiceError
from modelpress_server.filters import Fields
from modelpress_server.listing import Scope, list_query, page_token
from scripted_executor import ScriptedExecutor
from server_harness import DEFAULTS, Client, chunks, digest_of, failure_of
from zip_writer import mutated

EXAMPLES = Path(__file__).parents[2] / "examples" / "mnist"
MAGICS = (
    b"",
    b"PK\x03\x04",
    b"PK\x05\x06",
    b"\x80\x02",
    b"\x80\x04\x95",
    b"\x08\x0a\x12",
    bytes(8) + b"{",
    b"\x93NUMPY",
)


@dataclass(frozen=True)
class Target:
    """`values`: what is drawn; `run`: what is done with it."""

    values: st.SearchStrategy[Any]
    run: Callable[[Any], None]


@cache
def _folder() -> Path:
    folder = Path(mkdtemp(prefix="modelpress-fuzz-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def _file(name: str, data: bytes) -> Path:
    path = _folder() / name
    path.write_bytes(data)
    return path


@cache
def _example(name: str) -> bytes:
    return (EXAMPLES / name).read_bytes()


@st.composite
def _damaged(draw: st.DrawFn, names: tuple[str, ...]) -> bytes:
    """An example file with a few bytes replaced, cut out or repeated."""
    data = bytearray(_example(draw(st.sampled_from(names))))
    for _ in range(draw(st.integers(1, 6))):
        # Near either end stand the headers and the directory.
        at = draw(st.one_of(st.integers(0, min(600, len(data))), st.integers(0, len(data))))
        at = len(data) - at if draw(st.booleans()) else at
        data[at : at + draw(st.integers(0, 8))] = draw(st.binary(max_size=8))
    return bytes(data)


_ARCHIVES = st.one_of(
    st.integers(0, 2**64).map(lambda seed: mutated(random.Random(seed))),
    _damaged(("model.pt2", "model_scripted.pt", "state_dict.pt", "samples.npz")),
)
_FILES = st.one_of(
    st.builds(bytes.__add__, st.sampled_from(MAGICS), st.binary(max_size=200)),
    _ARCHIVES,
    _damaged(("model.onnx", "state_dict.safetensors")),
)


def _sniff(data: bytes) -> None:
    with contextlib.suppress(CompressionError):
        assert detect(_file("sniffed", data)) in FORMATS


def _read_archive(data: bytes) -> None:
    try:
        archive, target = Archive(io.BytesIO(data)), io.BytesIO()
        write_copy(archive, target)
    except CompressionError:
        return
    wanted = {item.name: archive.read(item, 1 << 30) for item in archive.members if not item.is_folder}
    copy = Archive(target)
    assert {item.name: copy.read(item, 1 << 30) for item in copy.members} == wanted
    with zipfile.ZipFile(target) as stored:
        assert {name: stored.read(name) for name in stored.namelist()} == wanted


_OPCODES = st.one_of(
    st.sampled_from(
        [b"(", b"}", b"]", b"R", b"b", b"\x93", b"\x94", b"0", b"1", b"2", b"N", b".", b"h\x00", b"Q", b"\x81"]
    ),
    st.sampled_from(["os", "system", "torch", "Size", "collections", "OrderedDict"]).map(
        lambda text: b"\x8c" + bytes([len(text)]) + text.encode()
    ),
    st.sampled_from([b"cos\nsystem\n", b"ctorch\nSize\n", b"ios\nsystem\n", b"\x82\x01", b"S'\\d'\n", b"V\\ud800\n"]),
    st.binary(max_size=6),
)


def _scan_pickle(data: bytes) -> None:
    with contextlib.suppress(CompressionError):
        scan = scan_pickle(data, "it")
        assert scan.end <= len(data)


def _onnx(data: bytes) -> None:
    try:
        proto = onnx.load_from_string(data)
    except Exception:  # noqa: BLE001  protobuf's own, which the loader catches
        return
    with contextlib.suppress(CompressionError):
        check_graph(proto)
        check_operators(proto)
        check_external_data(proto, Source(_file("main.onnx", data)))


@dataclass(frozen=True)
class External:
    """The entries of a tensor's external data, in order; keys may be there twice."""

    entries: tuple[tuple[str, str], ...]
    dims: tuple[int, ...]
    data_type: int
    raw: bytes


@cache
def _data_folder() -> Path:
    folder = _folder() / "model"
    (folder / "sub").mkdir(parents=True)
    (folder / "w.bin").write_bytes(bytes(64))
    (folder / "sub" / "w.bin").write_bytes(bytes(64))
    (folder / "link").symlink_to("/etc/passwd")
    (folder / "up").symlink_to("/etc")
    (folder.parent / "secret").write_bytes(bytes(64))
    os.link(folder.parent / "secret", folder / "hard")
    (folder / "model.onnx").touch()
    return folder


_LOCATIONS = st.one_of(
    st.sampled_from(
        [
            "w.bin",
            "sub/w.bin",
            "./w.bin",
            "sub/../w.bin",
            "../secret",
            "/etc/passwd",
            "link",
            "up/passwd",
            "hard",
            "sub",
            "",
        ]
    ),
    st.lists(st.sampled_from(["w.bin", "sub", "..", ".", "", "link", "up", "C:", "\0", "~", "\\"]), max_size=5).map(
        "/".join
    ),
    st.text(max_size=20),
)
_NUMBERS = st.one_of(
    st.integers(-(2**65), 2**65).map(str),
    st.integers(-70, 70).map(str),
    st.text(max_size=6),
    st.just("1_6"),
    st.just("١٦"),
)
_EXTERNAL = st.builds(
    External,
    st.lists(
        st.one_of(
            st.tuples(st.just("location"), _LOCATIONS),
            st.tuples(st.sampled_from(["offset", "length", "checksum", "Location"]), _NUMBERS),
        ),
        max_size=5,
    ).map(tuple),
    st.lists(st.one_of(st.integers(-2, 9), st.integers(-(2**63), 2**63 - 1)), max_size=3).map(tuple),
    st.integers(-1, 30),
    st.binary(max_size=4),
)


def _external_data(value: External) -> None:
    folder = _data_folder()
    tensor = onnx.TensorProto(name="w", data_type=value.data_type, dims=value.dims, raw_data=value.raw)
    tensor.data_location = onnx.TensorProto.EXTERNAL
    for key, text in value.entries:
        with contextlib.suppress(UnicodeEncodeError, ValueError):  # protobuf holds no lone surrogates
            tensor.external_data.add(key=key, value=text)
    proto = onnx.ModelProto()
    proto.graph.initializer.append(tensor)
    try:
        (found,) = check_external_data(proto, Source(folder / "model.onnx"))
    except CompressionError:
        return
    settled = proto.graph.initializer[0]
    (location, offset, length) = (entry.value for entry in settled.external_data)
    assert found.resolve() in ((folder / "w.bin").resolve(), (folder / "sub" / "w.bin").resolve())
    assert (folder / location).samefile(found)
    assert not settled.raw_data
    assert int(offset) >= 0
    assert int(length) >= 0
    assert int(offset) + int(length) <= 64


_WORDS = st.sampled_from(
    [
        "version",
        "steps",
        "fuse",
        "quantize",
        "prune",
        "distill",
        "factorize",
        "scheme",
        "static",
        "auto",
        "sparsity",
        "goal",
        "objective",
        "smallest",
        "constraints",
        "max_drop",
        "benchmark",
        "threads",
        "target",
        "device",
        "exclude",
        "structure",
        "augment",
    ]
)
_SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**70), 2**70),
    st.floats(),
    st.text(max_size=8),
    _WORDS,
    st.just(1),
    st.just(0.5),
)
_DOCUMENTS = st.recursive(
    _SCALARS,
    lambda inner: st.one_of(
        st.lists(inner, max_size=4), st.dictionaries(st.one_of(_WORDS, _WORDS, st.text(max_size=4)), inner, max_size=4)
    ),
    max_leaves=15,
)
_RECIPES = st.one_of(
    _DOCUMENTS,
    st.fixed_dictionaries(
        {"version": st.just(1)},
        optional={
            "steps": st.lists(st.dictionaries(_WORDS, _DOCUMENTS, min_size=1, max_size=2), max_size=3),
            "goal": _DOCUMENTS,
            "constraints": _DOCUMENTS,
            "benchmark": _DOCUMENTS,
        },
    ),
)


def _accepts(parse: Callable[[Any], object], document: Any) -> bool:
    try:
        parse(document)
    except (CompressionError, RecipeError):
        return False
    return True


def _recipe(document: Any) -> None:
    assert _accepts(Recipe.from_dict, document) == _accepts(language.from_dict, document)


def _recipe_file(text: str) -> None:
    with contextlib.suppress(ModelpressError):
        language_document = load_yaml(_file("recipe.yaml", text.encode(errors="surrogatepass")))
        assert isinstance(language_document, dict)


_YAML = st.one_of(
    _RECIPES.map(lambda document: str(yaml.safe_dump(document, allow_unicode=True))),
    st.lists(
        st.sampled_from(
            [
                "version: 1",
                "steps:",
                "  - fuse: {}",
                "- &a [*a, *a]",
                "{",
                "}",
                "[",
                "!!python/object",
                "? ",
                "\t",
                "---",
                "<<: *a",
                "&a",
                "*a",
                "'",
                '"',
                ": ",
                "2001-01-01",
                "0x1",
                ".inf",
                "\x00",
                "\ufeff",
            ]
        ),
        max_size=12,
    ).map("\n".join),
    st.text(max_size=60),
)


@dataclass(frozen=True)
class Listing:
    """The fields of a List request."""

    page_size: int
    token: str
    text: str
    by_model: bool


_FILTERS = st.one_of(
    st.lists(
        st.sampled_from(
            [
                "state",
                "labels.",
                "labels.a",
                "model",
                " = ",
                "=",
                '"',
                "ACTIVE",
                '"x"',
                '"a\\"b"',
                " AND ",
                "AND",
                " OR ",
                "(",
                ")",
                "!=",
                ">=",
                ":*",
                "create_time",
                "2026-11-01T00:00:00Z",
                "\\",
                "projects/p/models/00000000000000000000000000",
                "é",
                "%",
                "'",
                ";",
                "--",
                "\0",
            ]
        ),
        max_size=14,
    ).map("".join),
    st.text(max_size=60),
)


def _listing(value: Listing) -> None:
    fields = Fields({"ACTIVE": 1, "REJECTED": 2}, times=("create_time",), by_model=value.by_model)
    scope = Scope("p", ("p",))
    try:
        query = list_query(scope, value.page_size, value.token, value.text, fields)
    except ServiceError:
        return
    assert 0 < query.page_size <= 1000
    token = page_token(scope, value.text, "0" * 26)
    assert list_query(scope, 1, token, value.text, fields).before_id == "0" * 26


_HEADERS = st.one_of(
    st.builds(
        "{{'descr': {!r}, 'fortran_order': {!r}, 'shape': {!r}, }}".format,
        st.one_of(
            st.sampled_from(["<f4", "|O", "<U9", "|V8", ">i8", "<f8", "|S0", "<c16", "|b1"]),
            st.text(max_size=4),
            st.none(),
        ),
        st.one_of(st.booleans(), st.integers()),
        st.one_of(
            st.lists(st.one_of(st.integers(-3, 9), st.integers(-(2**70), 2**70)), max_size=4).map(tuple),
            st.lists(st.one_of(st.text(max_size=2), st.floats(), st.booleans()), max_size=3).map(tuple),
            st.integers(),
        ),
    ),
    st.integers(0, 3000).map(lambda depth: "(" * depth + ")" * depth),
    st.text(max_size=60),
)


@st.composite
def _npz(draw: st.DrawFn) -> bytes:
    if draw(st.booleans()):
        return draw(_damaged(("samples.npz", "eval.npz")))
    header = draw(_HEADERS).encode(errors="replace")[:60_000]
    version = draw(st.sampled_from([(1, 0), (2, 0), (3, 0), (9, 9)]))
    length = struct.pack("<H" if version == (1, 0) else "<I", len(header))
    array = b"\x93NUMPY" + bytes(version) + length + header + draw(st.binary(max_size=64))
    target = io.BytesIO()
    with zipfile.ZipFile(target, "w", draw(st.sampled_from([zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED]))) as archive:
        archive.writestr("x.npy", array)
    return target.getvalue()


def _arrays(data: bytes) -> None:
    specs = (TensorSpec("x", "float32", ("batch", 1, 28, 28)),)
    with contextlib.suppress(CompressionError):
        InputData.read(_file("data.npz", data), specs, _folder())


@dataclass(frozen=True)
class Message:
    """One message of an upload, as it should be but for what is drawn."""

    size: int
    wrong_crc: bool
    offset_by: int
    finish: bool


@dataclass(frozen=True)
class Stream:
    """The messages of one WriteUpload call; `noise`: raw bytes instead of the last one."""

    messages: tuple[Message, ...]
    noise: bytes | None
    name: str | None


_STREAMS = st.lists(
    st.builds(
        Stream,
        st.lists(
            st.builds(
                Message,
                st.integers(0, 40),
                st.sampled_from([False, False, False, False, True]),
                st.sampled_from([0, 0, 0, 0, 0, 1, -1, 2**62]),
                st.sampled_from([False, False, True]),
            ),
            max_size=4,
        ).map(tuple),
        st.one_of(st.none(), st.none(), st.binary(max_size=12)),
        st.sampled_from([None, None, None, "", "projects/p/uploads/x", "\0"]),
    ),
    min_size=1,
    max_size=4,
)


class UploadServer:
    """A real server on 127.0.0.1, in a loop of this thread that runs while an upload is tried."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        settings = Settings(**{**DEFAULTS, "data_dir": _folder() / "data", "max_open_uploads": 1_000_000})
        executor = ScriptedExecutor()
        self._server = Server(settings, lambda _: executor)
        self._loop.run_until_complete(self._server.start())
        self._channel = self._loop.run_until_complete(self._open())
        self._client = Client(self._channel)
        self._count = 0

    async def _open(self) -> grpc.aio.Channel:
        return grpc.aio.insecure_channel(self._server.address)

    def close(self) -> None:
        """Ends it."""
        self._loop.run_until_complete(self._channel.close())
        self._loop.run_until_complete(self._server.stop())
        self._loop.close()

    def attempt(self, streams: list[Stream]) -> None:
        """Sends the streams one after the other, and then what is right; what is stored is what was announced."""
        self._loop.run_until_complete(self._attempt(streams))

    async def _attempt(self, streams: list[Stream]) -> None:
        self._count += 1
        content = b"%030d" % self._count
        upload = await self._client.start_upload(content)
        for stream in streams:
            try:
                await self._send(upload.name, content, stream)
            except grpc.aio.AioRpcError as error:
                _refuse_internal(error)
        await self._finish(content)
        assert await self._client.read(digest_of(content)) == content

    async def _finish(self, content: bytes) -> None:
        upload = await self._client.start_upload(content)
        if upload.state != upload_service_pb2.Upload.STATE_COMPLETED:
            await self._client.send(chunks(upload.name, content, upload.committed_size))

    async def _send(self, name: str, content: bytes, stream: Stream) -> None:
        offset = await self._committed(name)
        requests = []
        for message in stream.messages:
            data = content[offset : offset + message.size]
            requests.append(
                upload_service_pb2.WriteUploadRequest(
                    name=name if stream.name is None else stream.name,
                    write_offset=max(-(2**62), offset + message.offset_by),
                    data=data,
                    crc32c=google_crc32c.value(data) ^ message.wrong_crc,
                    finish_write=message.finish,
                ).SerializeToString()
            )
            offset += len(data)
        if stream.noise is not None:
            requests[-1:] = [stream.noise]
        call = self._channel.stream_stream("/modelpress.v1.UploadService/WriteUpload")(iter(requests))
        async for _ in call:
            pass

    async def _committed(self, name: str) -> int:
        try:
            found = await self._client.uploads.GetUpload(upload_service_pb2.GetUploadRequest(name=name))
        except grpc.aio.AioRpcError as error:
            _refuse_internal(error)
            return 0
        return int(found.committed_size)


def _refuse_internal(error: grpc.aio.AioRpcError) -> None:
    if error.details() == "Internal error from Core":
        return  # the client's own gRPC, which was still sending when the server had answered
    if failure_of(error).reason == "INTERNAL":
        raise error


@cache
def upload_server() -> UploadServer:
    """The one of this process; whoever asked for it closes it in the end."""
    return UploadServer()


def _upload(streams: list[Stream]) -> None:
    upload_server().attempt(streams)


TARGETS = {
    "sniffer": Target(_FILES, _sniff),
    "archive": Target(_ARCHIVES, _read_archive),
    "pickle": Target(
        st.lists(_OPCODES, max_size=30).map(lambda parts: b"\x80\x04" + b"".join(parts) + b"."), _scan_pickle
    ),
    "onnx": Target(_damaged(("model.onnx",)), _onnx),
    "external data": Target(_EXTERNAL, _external_data),
    "arrays": Target(_npz(), _arrays),
    "recipe": Target(_RECIPES, _recipe),
    "recipe file": Target(_YAML, _recipe_file),
    "filter": Target(
        st.builds(
            Listing, st.integers(-5, 2000), st.one_of(st.just(""), st.text(max_size=60)), _FILTERS, st.booleans()
        ),
        _listing,
    ),
    "upload": Target(_STREAMS, _upload),
}
