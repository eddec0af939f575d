"""Hostile files and requests, made as they are needed: no bomb is stored."""

from __future__ import annotations

import sys
from pathlib import Path

# The generators beside this file; in importlib mode pytest does not put the folder on the path.
sys.path.insert(0, str(Path(__file__).parent))
