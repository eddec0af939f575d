"""A short campaign of random faults; a long one is run by hand: `python tests/faults/campaign.py --kills 1000`."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from campaign import run_campaign


@pytest.mark.slow
def test_nothing_is_lost_doubled_or_failed(tmp_path: Path) -> None:
    """Kills of server, workers and clients, rot, full disks, clocks that are set, workers that do not start."""
    outcome = run_campaign(tmp_path, kills=15, seed=7, pause_s=1.0)
    assert outcome.violations == []
    assert outcome.kills >= 15
    assert outcome.seen["SUCCEEDED"] > 0
