"""A short campaign of random faults; a long one is run by hand: `python tests/faults/campaign.py --kills 1000`."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "server"))
sys.path.insert(0, str(Path(__file__).parent))
import postgres_server
import s3_server
from campaign import run_campaign


@pytest.mark.slow
def test_nothing_is_lost_doubled_or_failed(tmp_path: Path) -> None:
    """Kills of server, workers and clients, rot, full disks, clocks that are set, workers that do not start."""
    outcome = run_campaign(tmp_path, kills=15, seed=7, pause_s=1.0)
    assert outcome.violations == []
    assert outcome.kills >= 15
    assert outcome.seen["SUCCEEDED"] > 0


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_nothing_is_lost_between_servers(tmp_path: Path) -> None:
    """The same of two servers on one PostgreSQL and one bucket, each of which is killed."""
    try:
        outcome = run_campaign(tmp_path, kills=15, seed=8, pause_s=1.0, shared=True)
    except (postgres_server.NotHereError, s3_server.NotHereError) as error:
        pytest.skip(str(error))
    assert outcome.violations == []
    assert outcome.kills >= 15
    assert outcome.seen["SUCCEEDED"] > 0
