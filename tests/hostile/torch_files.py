"""Programs and scripts of torch, honest and hostile, as archives whose parts can be exchanged."""

from __future__ import annotations

import io
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from zip_writer import Member, Zip


class Net(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x)


class ReadsFile(Net):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x) + torch.from_file("/etc/passwd", False, 64, dtype=torch.uint8).sum()


class Touch:
    """Unpickling it creates a file: proof that a pickle was executed."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.marker,)


def zip_of(data: bytes) -> Zip:
    """The members of an archive that torch wrote."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        return Zip([Member(info.filename.encode(), archive.read(info)) for info in archive.infolist()])


def renamed(archive: Zip, change: Callable[[bytes], bytes]) -> Zip:
    return Zip([Member(change(member.name), member.data) for member in archive.members])


class Endless(Net):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        while bool(x.sum() > -1.0):
            x = x + 1.0
        return x


class Greedy(Net):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x) + torch.zeros(100 << 30, dtype=torch.uint8).sum()


class Loud(Net):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for _ in range(100000):
            print("\x1b[31mRED\x1b]0;title\x07 bad_alloc out of memory")
        return self.layer(x)


def make_program() -> Zip:
    """An exported program."""
    buffer = io.BytesIO()
    torch.export.save(torch.export.export(Net().eval(), (torch.ones(2, 4),)), buffer)
    return zip_of(buffer.getvalue())


def make_script(module: torch.nn.Module) -> Zip:
    """TorchScript of a module."""
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`torch.jit")
        torch.jit.save(torch.jit.script(module.eval()), buffer)
    return zip_of(buffer.getvalue())


def with_payload(program: Zip, marker: Path) -> Zip:
    """The program with sample inputs that execute code when they are unpickled."""
    buffer = io.BytesIO()
    torch.save(Touch(marker), buffer)
    return with_samples(program, buffer.getvalue())


def with_samples(program: Zip, data: bytes) -> Zip:
    """The program with other sample inputs."""
    return Zip([Member(item.name, data if b"sample_inputs" in item.name else item.data) for item in program.members])
