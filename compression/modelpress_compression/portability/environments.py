"""Environments to run a model in, made with pip and apt and kept in a folder.

Each is made in a folder of its own beside its place and renamed: it is there whole or not at all.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from modelpress_compression.portability.levels import AARCH64_CPUINFO, Level, Masks, can_stand_in
from modelpress_compression.portability.trapping import trapped

LATEST = "latest"
_FIRST_WITH_NUMPY_2 = (1, 19)
_SHOWN_CHARS = 300  # of what a tool prints when it fails
_WHEELS = "manylinux_2_17_aarch64 manylinux2014_aarch64 manylinux_2_27_aarch64 manylinux_2_28_aarch64"
_AARCH64_SYSTEM = ("python3", "libstdc++6")
Tell = Callable[[str], None]


class NotHadError(Exception):
    """There is no such environment here; the message says why, and what to do."""


@dataclass(frozen=True)
class Place:
    """Where a model runs. `command` runs a Python file there; `how`: a few words on what makes the place."""

    name: str
    how: str
    command: tuple[str, ...]
    variables: Mapping[str, str] = field(default_factory=dict)
    masks: Masks = ()


HERE = Place("here", "this environment", (sys.executable,))


@dataclass(frozen=True)
class Environments:
    """Those that are kept in `folder`. `tell`: hears what is being made."""

    folder: Path
    tell: Tell

    def of_version(self, wanted: str) -> Place:
        """One with this version of onnxruntime. Raises NotHadError."""
        number = _newest() if wanted == LATEST else wanted
        tag = f"{sys.implementation.cache_tag}-{os.uname().machine}"
        path = self._made(f"onnxruntime-{number}-{tag}", lambda target: _install(_requirements(number), target))
        return Place(f"onnxruntime {number}", "an environment of its own", *_isolated(path, (sys.executable,)))

    def of_level(self, level: Level, flags: Collection[str], *, emulated: bool) -> Place:
        """This environment's onnxruntime on such a CPU. `emulated`: by QEMU even where this CPU can stand in. Raises
        NotHadError."""
        if level.machine == "aarch64" and os.uname().machine != "aarch64":
            return self._aarch64(level)
        if can_stand_in(level, flags) and not emulated:
            return self._masked(level)
        if not level.qemu_cpu:
            missing = ", ".join(sorted(level.needs - set(flags)))
            why = f"this CPU lacks {missing}, and" if missing else "the CPU's features can be masked, but"
            raise NotHadError(f"{why} QEMU knows no AVX-512")
        qemu = _qemu(level)
        command = (str(qemu), "-cpu", level.qemu_cpu, sys.executable)
        return Place(f"{level.name} (QEMU)", f"emulated by {qemu.name}", command)

    def _masked(self, level: Level) -> Place:
        import onnxruntime

        package = Path(onnxruntime.__file__).parent
        tag = f"{sys.implementation.cache_tag}-{os.uname().machine}"
        path = self._made(f"trapped-{onnxruntime.__version__}-{tag}", lambda target: _trap(package, target))
        others = os.environ.get("PYTHONPATH", "")
        variables = {"PYTHONPATH": os.pathsep.join(filter(None, [str(path), others]))}
        return Place(level.name, "this CPU, with features masked", (sys.executable,), variables, level.masks)

    def _aarch64(self, level: Level) -> Place:
        qemu = _qemu(level)
        root = self._made("debian-aarch64", _aarch64_system)
        pythons = sorted((root / "usr" / "bin").glob("python3.[0-9]*"))
        number = version("onnxruntime")
        abi = pythons[0].name.removeprefix("python")
        wheels = [part for name in _WHEELS.split() for part in ("--platform", name)]
        options = [*wheels, "--python-version", abi, "--implementation", "cp"]
        path = self._made(
            f"onnxruntime-{number}-cp{abi.replace('.', '')}-aarch64",
            lambda target: _install(_requirements(number), target, *options),
        )
        command = (str(qemu), "-cpu", level.qemu_cpu, "-L", str(root), str(pythons[0]))
        return Place(level.name, f"emulated by {qemu.name}", *_isolated(path, command))

    def _made(self, name: str, make: Callable[[Path], None]) -> Path:
        """The environment of this name, made where it is not there yet. Raises NotHadError."""
        place = self.folder / name
        if place.is_dir():
            return place
        self.tell(f"making the environment {name}")
        self.folder.mkdir(parents=True, exist_ok=True)
        with _beside(place) as target:
            make(target)
            try:
                target.rename(place)
            except OSError:
                if not place.is_dir():  # else another command was first
                    raise
        return place


@contextmanager
def _beside(place: Path) -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix=".making-", dir=place.parent, ignore_cleanup_errors=True) as folder:
        target = Path(folder) / "made"
        target.mkdir()
        yield target


def _isolated(path: Path, python: tuple[str, ...]) -> tuple[tuple[str, ...], dict[str, str]]:
    """The command and the variables of a Python that sees its own library and `path` alone."""
    return (*python, "-S"), {"PYTHONPATH": str(path), "PYTHONNOUSERSITE": "1"}


def _requirements(number: str) -> list[str]:
    parts = tuple(int(part) for part in number.split(".")[:2] if part.isdecimal())
    return [f"onnxruntime=={number}", "numpy" if parts >= _FIRST_WITH_NUMPY_2 else "numpy<2"]


def _install(requirements: Sequence[str], target: Path, *options: str) -> None:
    _pip("install", "--quiet", "--only-binary=:all:", "--target", str(target), *options, *requirements)


def _newest() -> str:
    """The newest version that pip finds for this Python."""
    options = ("--quiet", "--dry-run", "--no-deps", "--ignore-installed", "--only-binary=:all:", "--report", "-")
    report: dict[str, Any] = json.loads(_pip("install", *options, "onnxruntime"))
    return str(report["install"][0]["metadata"]["version"])


def _pip(command: str, *arguments: str) -> str:
    return _ran([sys.executable, "-m", "pip", command, "--disable-pip-version-check", "--no-input", *arguments], "pip")


def _trap(package: Path, target: Path) -> None:
    try:
        trapped(package, target)
    except ImportError as error:
        raise NotHadError("masking features needs capstone: pip install 'modelpress[verify]'") from error
    except (OSError, ValueError) as error:
        raise NotHadError(f"onnxruntime cannot be copied and trapped: {error}") from error


def _aarch64_system(target: Path) -> None:
    """A Python for AArch64 from the packages of this machine's distribution, unpacked, not installed."""
    if not (shutil.which("apt-get") and shutil.which("dpkg-deb")):
        raise NotHadError("a Python for AArch64 is made of Debian's packages, and there is no apt-get here")
    state = target.parent / "apt"
    for folder in ("lists/partial", "cache/archives/partial"):
        (state / folder).mkdir(parents=True)
    (state / "status").touch()
    settings = {
        "APT::Architecture": "arm64",
        "APT::Architectures::": "arm64",
        "APT::Install-Recommends": "false",
        "APT::Sandbox::User": "",
        "Debug::NoLocking": "true",
        "Dir::State::lists": str(state / "lists"),
        "Dir::State::status": str(state / "status"),
        "Dir::Cache": str(state / "cache"),
        "Dir::Cache::archives": str(state / "cache" / "archives"),
    }
    apt = ["apt-get", "-qq", *[part for item in settings.items() for part in ("-o", "=".join(item))]]
    _ran([*apt, "update"], "apt-get update")
    _ran([*apt, "install", "-y", "--download-only", *_AARCH64_SYSTEM], "apt-get for arm64")
    for package in sorted((state / "cache" / "archives").glob("*.deb")):
        _ran(["dpkg-deb", "-x", str(package), str(target)], "dpkg-deb")
    (target / "proc").mkdir()
    (target / "proc" / "cpuinfo").write_text(AARCH64_CPUINFO, "utf-8")


def _qemu(level: Level) -> Path:
    found = shutil.which(f"qemu-{level.machine}") or shutil.which(f"qemu-{level.machine}-static")
    if found is None:
        raise NotHadError(f"there is no qemu-{level.machine}; Debian and Ubuntu: apt install qemu-user")
    return Path(found)


def _ran(command: Sequence[str], name: str) -> str:
    """What it prints. Raises NotHadError with the end of its errors."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL)
    except OSError as error:
        raise NotHadError(f"{name} cannot be run: {error}") from error
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.strip()] or [f"exit code {done.returncode}"]
        raise NotHadError(f"{name} failed: {lines[-1].removeprefix('ERROR: ')[:_SHOWN_CHARS]}")
    return done.stdout
