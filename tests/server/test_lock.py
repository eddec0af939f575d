"""The data folder is the server's alone."""

from __future__ import annotations

import stat
from pathlib import Path

import pytest
from modelpress_server.config import SettingsError
from modelpress_server.lock import DataDirLock
from server_harness import Serve


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


async def test_nobody_else_reads_the_data(serve: Serve, tmp_path: Path) -> None:
    """A folder that was open is closed, and so is every file of the database."""
    data = tmp_path / "data"
    data.mkdir(mode=0o755)
    (data / "modelpress.db").touch(mode=0o644)
    async with serve() as running:
        await running.client.upload(b"something to write down")
        assert mode(data) == 0o700
        assert {mode(path) for path in data.glob("modelpress.db*")} == {0o600}


def test_a_folder_that_cannot_be_closed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is refused with the way out; one that is closed already is taken, whoever owns it."""

    def refuse(self: Path, mode: int) -> None:
        raise PermissionError(1, "Operation not permitted", str(self))

    monkeypatch.setattr(Path, "chmod", refuse)
    (tmp_path / "open").mkdir(mode=0o755)
    (tmp_path / "closed").mkdir(mode=0o700)
    with pytest.raises(SettingsError, match=r"open to others \(mode 755\).*--data-dir"):
        DataDirLock(tmp_path / "open").acquire()
    lock = DataDirLock(tmp_path / "closed")
    lock.acquire()
    lock.release()
