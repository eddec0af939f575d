"""One file in other versions of onnxruntime and on other CPUs."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import onnx
import pytest
from modelpress_client.verification import CPUS
from modelpress_compression import InputData, Model, Recipe, compress
from modelpress_compression.errors import InvalidInputsError
from modelpress_compression.portability import Wanted, verify
from modelpress_compression.portability.environments import Environments, NotHadError
from modelpress_compression.portability.levels import LEVELS, can_stand_in
from modelpress_compression.portability.trapping import CPUID, cpuid_places
from modelpress_compression.report.environment import cpu_flags
from onnx import TensorProto, helper, numpy_helper

NOWHERE = Wanted(versions=(), levels=())


@pytest.fixture
def saturating(tmp_path: Path) -> Path:
    """Products of 8 bits whose pairs exceed 16 bits: 255 * 127 + 255 * 127."""
    nodes = [helper.make_node("MatMulInteger", ["x", "w"], ["y"])]
    graph = helper.make_graph(
        nodes,
        "saturating",
        [helper.make_tensor_value_info("x", TensorProto.UINT8, ["n", 64])],
        [helper.make_tensor_value_info("y", TensorProto.INT32, ["n", 16])],
        [numpy_helper.from_array(np.full((64, 16), 127, np.int8), "w")],
    )
    path = tmp_path / "saturating.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
    return path


def elf(code: bytes) -> bytes:
    """The least that has a section of instructions."""
    header = bytearray(64)
    header[:5] = b"\x7fELF\x02"
    struct.pack_into("<Q", header, 40, 64)  # where the table of sections begins
    struct.pack_into("<HH", header, 58, 64, 1)
    section = struct.pack("<IIQQQQIIQQ", 0, 1, 4, 0, 128, len(code), 0, 0, 16, 0)
    return bytes(header) + section + code


def test_only_the_instruction_is_found() -> None:
    """Not its bytes within an address or a constant."""
    pytest.importorskip("capstone")
    constant = b"\xb8" + CPUID + b"\x00\x00"  # mov eax, 0xa20f
    call = b"\xe8" + CPUID + b"\xf4\xff"  # call to an address
    asked = b"\xb8\x07\x00\x00\x00" + b"\x31\xc9" + CPUID + b"\x41\x89\xd0"  # mov eax, 7; xor ecx, ecx; cpuid; mov
    filler = b"\x48\x89\xc3" * 30
    code = filler + constant + filler + call + filler + asked + filler
    (place,) = cpuid_places(elf(code))
    assert place == 128 + code.index(asked) + 7
    assert list(cpuid_places(b"no program")) == []


def test_what_cannot_be_had_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With what would help, and nothing is left in the cache."""
    environments = Environments(tmp_path / "cache", lambda text: None)
    with pytest.raises(NotHadError, match=r"lacks avx512bw.*QEMU knows no AVX-512"):
        environments.of_level(LEVELS["skylake-x"], ["avx2"], emulated=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(NotHadError, match=r"there is no qemu-x86_64.*apt install qemu-user"):
        environments.of_level(LEVELS["haswell"], ["avx2", "fma"], emulated=True)
    with pytest.raises(NotHadError, match="pip failed"):
        environments.of_version("0.0.no.version")
    assert list((tmp_path / "cache").iterdir()) == []


def test_a_file_that_runs_nowhere_else_is_not_called_portable(saturating: Path, tmp_path: Path) -> None:
    """Without places there is nothing to say; what is no ONNX is refused."""
    found = verify(saturating, {"x": np.full((4, 64), 255, np.uint8)}, NOWHERE, tmp_path / "cache", lambda text: None)
    assert (found["portable"], found["places"], found["samples"]) == (None, [], 4)
    assert found["computes_in_8_bits"]
    scripted = Path(__file__).parents[2] / "examples" / "mnist" / "model_scripted.pt"
    with pytest.raises(InvalidInputsError, match=r"model_scripted.pt is .*TorchScript"):
        verify(scripted, None, NOWHERE, tmp_path, lambda text: None)


def test_products_that_round_their_activations_compute_in_8_bits(digits: Model, tmp_path: Path) -> None:
    """Of stored weights, in MatMulNBits with accuracy_level 4: another kernel rounds otherwise. Float models do not."""
    digits.save(tmp_path / "float.onnx")
    recipe = Recipe.from_dict(
        {"version": 1, "steps": [{"quantize": {"scheme": "weight_only"}}], "benchmark": {"rounds": 6}}
    )
    stored = compress(digits, recipe).model
    assert any(node.op_type == "MatMulNBits" for node in stored.nodes())
    stored.save(tmp_path / "stored.onnx")
    for name, expected in (("float", False), ("stored", True)):
        found = verify(tmp_path / f"{name}.onnx", None, NOWHERE, tmp_path / "cache", lambda text: None)
        assert found["computes_in_8_bits"] is expected


def test_the_client_knows_the_levels() -> None:
    """It cannot import the engine's table."""
    assert tuple(LEVELS) == CPUS


@pytest.mark.slow
def test_saturation_is_seen_and_ours_has_none(
    saturating: Path, digits: Model, samples: InputData, tmp_path: Path
) -> None:
    """On a CPU that hides VNNI the products saturate; a model that we quantized answers there bit for bit alike."""
    pytest.importorskip("capstone")
    flags = cpu_flags()
    levels = tuple(name for name, level in LEVELS.items() if can_stand_in(level, flags))
    if "ice-lake" not in levels:
        pytest.skip("this CPU has no AVX-512 with VNNI")
    wanted = Wanted(versions=(), levels=levels)
    found = verify(saturating, {"x": np.full((4, 64), 255, np.uint8)}, wanted, tmp_path / "cache", lambda text: None)
    verdicts = {row["place"]: row["verdict"] for row in found["places"]}
    assert verdicts == {"haswell": "differs", "skylake-x": "differs", "ice-lake": "equal"}
    assert found["portable"] is False

    recipe = Recipe.from_dict({"version": 1, "steps": [{"quantize": {"scheme": "static"}}], "benchmark": {"rounds": 6}})
    compress(digits, recipe, data=samples).model.save(tmp_path / "ours.onnx")
    found = verify(tmp_path / "ours.onnx", dict(samples.arrays), wanted, tmp_path / "cache", lambda text: None)
    assert found["computes_in_8_bits"]
    assert [row["verdict"] for row in found["places"]] == ["equal"] * 3, found["places"]
