"""Hostile files and requests, made as they are needed: no bomb is stored."""

from __future__ import annotations

import sys
from pathlib import Path

# The generators beside this file, and what speaks to a server; in importlib mode pytest puts neither on the path.
for folder in ("hostile", "server"):
    sys.path.insert(0, str(Path(__file__).parents[1] / folder))
