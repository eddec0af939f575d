"""Whether a model's file answers alike elsewhere: the engine runs it there (`modelpress_compression.portability`)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import platformdirs

from modelpress_client.engine import run_engine

ENGINE_MODULE = "modelpress_compression.portability"
ENGINE_PACKAGES = ("modelpress_compression", "onnx", "onnx_ir", "onnxruntime")
# The engine's table of levels, which this package cannot import.
CPUS = ("haswell", "skylake-x", "ice-lake", "aarch64")


@dataclass(frozen=True)
class Verification:
    """Where a file is run. `versions` of onnxruntime and `cpus`: none: those that the engine takes by itself.
    `emulated`: by QEMU even on CPUs that this one can stand in for. `samples`: at most; None: as many as it takes."""

    data: Path | None = None
    versions: tuple[str, ...] = ()
    cpus: tuple[str, ...] = ()
    emulated: bool = False
    samples: int | None = None


async def verify(path: Path, wanted: Verification, tell: Callable[[str], None] | None = None) -> dict[str, Any]:
    """The engine's document: `here`, `places` with a verdict each, `portable`. Environments are kept in the user's
    cache. Raises as `run_engine`."""
    arguments = [str(path), "--cache", str(platformdirs.user_cache_path("modelpress") / "portability")]
    if wanted.data is not None:
        arguments += ["--data", str(wanted.data)]
    for number in wanted.versions:
        arguments += ["--onnxruntime", number]
    for name in wanted.cpus:
        arguments += ["--cpu", name]
    if wanted.samples is not None:
        arguments += ["--samples", str(wanted.samples)]
    if wanted.emulated:
        arguments.append("--qemu")
    doing = f"Running {path} elsewhere"
    return await run_engine(ENGINE_MODULE, arguments, doing=doing, packages=ENGINE_PACKAGES, extra="verify", tell=tell)
