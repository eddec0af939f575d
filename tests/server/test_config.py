"""Settings of the server."""

from pathlib import Path

import pytest
from modelpress_server.config import Settings


def test_data_dir_is_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Workers run in folders of their own, so a relative data folder is fixed at the start; ~ is the home folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/someone")
    assert Settings(data_dir=Path("data")).data_dir == tmp_path / "data"
    assert Settings(data_dir=Path("~/data")).data_dir == Path("/home/someone/data")
