"""`compress-client verify`: the table, the document and the exit code of what the engine saw."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from modelpress_client import verification

RunCli = Callable[..., Any]
ENGINE = """
import json, sys
row = {"kind": "cpu", "how": "masked", "detail": "", "sqnr_db": 62.5, "max_abs_error": 0.25, "top1_agreement": 0.75,
       "seconds": 1.0}
verdict = "differs" if "haswell" in sys.argv else "close"
print("running elsewhere", file=sys.stderr)
print("whatever onnxruntime prints")
print(json.dumps({"model": sys.argv[1], "data": "synthetic", "samples": 4, "portable": verdict == "close",
                  "here": {"cpu": "A CPU", "onnxruntime": "1.31.1"},
                  "places": [{**row, "place": "there", "verdict": verdict}]}))
"""


@pytest.fixture
def engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A module in the engine's place, in a process of its own as the engine is."""
    (tmp_path / "scripted_engine.py").write_text(ENGINE)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(verification, "ENGINE_MODULE", "scripted_engine")


@pytest.mark.usefixtures("engine")
def test_verify(run_cli: RunCli, model_file: Path) -> None:
    """Figures for people, the document for machines; 6 where an answer differs."""
    done = run_cli("verify", model_file, "--cpu", "skylake-x")
    assert done.code == 0, done.err
    for text in ("there", "close", "62.5 dB", "0.25", "75.00%", "made-up inputs"):
        assert text in done.out
    assert "running elsewhere" in done.err
    done = run_cli("verify", model_file, "--cpu", "haswell", "--json", "--quiet")
    assert done.code == 6
    assert json.loads(done.out)["places"][0]["verdict"] == "differs"
    assert done.err == ""


def test_verify_without_the_engine(run_cli: RunCli, model_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The exact pip line."""
    monkeypatch.setattr(verification, "ENGINE_PACKAGES", ("a_package_that_is_missing",))
    done = run_cli("verify", model_file)
    assert done.code == 2
    assert "pip install 'modelpress[verify]'" in done.err
