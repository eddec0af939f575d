"""Sizes for dynamic dimensions are found by trying."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pytest
from modelpress_compression.errors import InvalidInputsError
from modelpress_compression.inputs import Array, Feeds
from modelpress_compression.loaders.trials import find_trials, first_line
from modelpress_compression.loaders.verify import Disagreement, check_outputs
from modelpress_compression.specs import parse_specs


def test_a_size_that_the_model_takes() -> None:
    """A model that takes multiples of 28 only is run at one, and the batch at another size as well."""

    def run(feeds: Feeds) -> list[Array]:
        if feeds["x"].shape[2] % 28 or feeds["x"].shape[3] % 28:
            raise ValueError("multiples of 28 only")
        return [feeds["x"].sum(axis=(1, 2, 3))]

    trials = find_trials(run, parse_specs(["x:float32[batch,1,H,W]"]), (ValueError,))
    assert trials.runs[0].sizes["H"] % 28 == 0
    assert len({trial.sizes["batch"] for trial in trials.runs}) > 1
    assert all(trial.feeds["x"].shape[0] == trial.sizes["batch"] for trial in trials.runs)
    assert not trials.warnings


def test_a_dimension_that_is_not_dynamic_is_reported() -> None:
    """Not an error, since another size may simply not have been tried."""

    def run(feeds: Feeds) -> list[Array]:
        if feeds["x"].shape[1] != 64:
            raise ValueError("64 only")
        return [feeds["x"]]

    trials = find_trials(run, parse_specs(["x:float32[batch,seq]"]), (ValueError,))
    assert trials.runs[0].sizes["seq"] == 64
    assert "'seq' ran at 64" in trials.warnings[0]


def test_lengths_that_are_never_0() -> None:
    """Integers are 0 or 1 first, and at least 1 where the model does not run on these."""

    def run(feeds: Feeds) -> list[Array]:
        if feeds["lengths"].min() < 1:
            raise ValueError("lengths have to be greater than 0")
        return [feeds["x"]]

    trials = find_trials(run, parse_specs(["x:float32[n,6,4]", "lengths:int64[n]"]), (ValueError,))
    assert len({trial.sizes["n"] for trial in trials.runs}) > 1
    assert all(trial.feeds["lengths"].max() <= 2 for trial in trials.runs)


def test_sizes_that_go_together() -> None:
    """`tie` is asked for every try, with the dimension that varies; what it brings back to the first size is no try."""
    tries = []

    def run(feeds: Feeds) -> list[Array]:
        tries.append((feeds["x"].shape[1], feeds["y"].shape[1]))
        return [feeds["x"]]

    def tie(sizes: Mapping[str, int], lead: str) -> Mapping[str, int]:
        half = (sizes["odd"] - 1 if lead == "odd" else sizes["even"]) // 2
        return {**sizes, "even": 2 * half, "odd": 2 * half + 1}

    trials = find_trials(run, parse_specs(["x:float32[n,even]", "y:float32[n,odd]"]), (ValueError,), tie)
    assert all(odd == even + 1 for even, odd in tries)
    assert len({trial.sizes["odd"] for trial in trials.runs}) > 1
    assert not trials.warnings


def test_what_the_model_said_is_repeated() -> None:
    """The first complaint, not the last."""

    def run(feeds: Feeds) -> list[Array]:
        raise ValueError("two channels, please")

    with pytest.raises(InvalidInputsError, match="two channels, please"):
        find_trials(run, parse_specs(["x:float32[batch,3,H,W]"]), (ValueError,))


def test_messages_of_the_interpreter() -> None:
    """Of TorchScript's traceback the error's own line is kept."""
    text = (
        "The following operation failed in the TorchScript interpreter.\n"
        "Traceback of TorchScript (most recent call last):\n"
        '  File "code/m.py", line 3, in forward\n    x\n    ~ <--- HERE\nRuntimeError: 3 is not 4\n'
    )
    assert first_line(RuntimeError(text)) == "3 is not 4"


@pytest.mark.parametrize(
    ("got", "said"),
    [
        (np.ones((2, 3), np.float32) * 1.01, "differs by"),
        (np.ones((3, 2), np.float32), r"\(3, 2\) instead of"),
        (np.full((2, 3), np.nan, np.float32), "not finite"),
    ],
)
def test_outputs_that_differ(got: Array, said: str) -> None:
    """1 % is no rounding, and neither are NaN or another shape; 0.01 % is."""
    one = np.ones((2, 3), np.float32)
    check_outputs([one], [one * 1.0001], ["y"])
    with pytest.raises(Disagreement, match=said):
        check_outputs([one], [got], ["y"])


def test_the_first_of_errors_that_led_to_others_is_told() -> None:
    """Exporters wrap what happened in words about themselves; an operator that they lack is named."""
    happened = ValueError("cannot guess the size")
    wrapped = RuntimeError("The error above occurred when calling torch.export.export.")
    wrapped.__cause__ = happened
    assert first_line(wrapped) == "cannot guess the size"
    outer = RuntimeError("Error when translating node %q : call_function[target=torch.ops.aten.linalg_qr.default]")
    outer.__cause__ = RuntimeError("No ONNX function found for <object at 0x7f>. Failure message: none")
    assert first_line(outer) == "the exporter has no ONNX for the operator aten::linalg_qr"
    outer.__cause__ = RuntimeError("No ONNX function found for <x>. Failure message: none for the complex-valued input")
    assert first_line(outer) == "the exporter has no ONNX for the operator aten::linalg_qr on complex numbers"


def test_the_source_that_failed_is_not_what_is_told() -> None:
    """torch shows the lines of the user's code behind the reason."""
    text = "no gradients of complex\n\nWhile executing %s : call_function\nFile 'm.py', line 3\n    y = x[:3]\n"
    assert first_line(RuntimeError(text)) == "no gradients of complex"


def test_an_operator_that_torch_does_not_know_is_told() -> None:
    """It stands first, above the code that calls it."""
    text = "\nUnknown builtin op: acme::spin.\nCould not find any similar ops.\n:\n  File 'm.py', line 2\n    y = x"
    assert first_line(RuntimeError(text)) == "Unknown builtin op: acme::spin"
