"""Settings of the server."""

import os
from pathlib import Path

import pytest
from modelpress_server.config import Settings, SettingsError


def test_data_dir_is_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Workers run in folders of their own, so a relative data folder is fixed at the start; ~ is the home folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/someone")
    assert Settings(data_dir=Path("data")).data_dir == tmp_path / "data"
    assert Settings(data_dir=Path("~/data")).data_dir == Path("/home/someone/data")


def test_cores_to_measure_on() -> None:
    """Single ones and ranges; what is no list, or not the server's to use, is refused."""
    allowed = sorted(os.sched_getaffinity(0))
    assert Settings().measure_core_numbers == ()
    assert Settings(measure_cores=f"{allowed[0]}").measure_core_numbers == (allowed[0],)
    twice = f"{allowed[0]}-{allowed[0]}, {allowed[-1]}"
    assert Settings(measure_cores=twice).measure_core_numbers == tuple(sorted({allowed[0], allowed[-1]}))
    for wrong in ("", "x", "1-", "3-2", "-1", "1;2"):
        with pytest.raises(SettingsError, match="is not a list of processors"):
            Settings(measure_cores=wrong)
    with pytest.raises(SettingsError, match="may not run on 99999"):
        Settings(measure_cores="99999")


def test_nodes_of_a_cluster() -> None:
    """They take files from a bucket; what is for nodes alone is refused without them."""
    cluster = {"ray_address": "ray://head:10001", "blobs": "s3://models"}
    assert Settings(**cluster, measure_on="bench=quiet", node_dir=Path("/var/tmp/x")).node_workers == 1
    with pytest.raises(SettingsError, match="ray_address: nodes take files from a bucket"):
        Settings(ray_address="auto")
    for wrong in ({"measure_on": "=quiet"}, {"node_workers": 0}, {"node_dir": Path("relative")}):
        with pytest.raises(SettingsError, match=next(iter(wrong))):
            Settings(**cluster, **wrong)
    for alone in ({"measure_on": "bench"}, {"node_dir": Path("/var/tmp/x")}):
        with pytest.raises(SettingsError, match="set --ray-address"):
            Settings(**alone)
