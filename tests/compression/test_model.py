"""The one representation, and the runtime under it."""

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from modelpress_compression import model as model_module
from modelpress_compression.errors import ModelNotRunnableError, UnsupportedOperatorError
from modelpress_compression.model import Model, Provenance
from modelpress_compression.runtime import open_session, run, session_of
from modelpress_compression.specs import TensorSpec
from onnx import TensorProto, helper

RNG = np.random.default_rng(0)
WEIGHT = RNG.normal(size=(3, 2)).astype(np.float32)


def affine(op_type: str = "MatMul", domain: str = "") -> Model:
    """y = x @ WEIGHT."""
    graph = helper.make_graph(
        [helper.make_node(op_type, ["x", "w"], ["y"], name="product", domain=domain)],
        "affine",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 3])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", 2])],
        [onnx.numpy_helper.from_array(WEIGHT, "w")],
    )
    opsets = [helper.make_opsetid("", 20)] + ([helper.make_opsetid(domain, 1)] if domain else [])
    proto = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    return Model(ir.from_proto(proto), Provenance("onnx", "0" * 64, 1))


def test_specs_keep_the_names_of_dynamic_dimensions() -> None:
    """Inputs and outputs are described as the user spelled them; weights are not inputs."""
    assert affine().inputs == (TensorSpec("x", "float32", ("batch", 3)),)
    assert affine().outputs == (TensorSpec("y", "float32", ("batch", 2)),)


def test_clone_is_independent() -> None:
    """What is done to a clone leaves the model as it was."""
    model = affine()
    clone = model.clone()
    clone.graph.initializers["w"].const_value = ir.tensor(np.zeros_like(WEIGHT))
    np.testing.assert_array_equal(model.graph.initializers["w"].const_value.numpy(), WEIGHT)


@pytest.mark.parametrize("threshold_bytes", [10**9, 0])
def test_save_and_run(threshold_bytes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A saved model computes the same, with its weights inside or, beyond the threshold, in a file beside it."""
    monkeypatch.setattr(model_module, "EXTERNAL_DATA_THRESHOLD_BYTES", threshold_bytes)
    big = affine()
    big.graph.initializers["w"].const_value = ir.tensor(np.tile(WEIGHT, (1, 100)))
    files = big.save(tmp_path / "m.onnx")
    assert [file.name for file in files] == (["m.onnx"] if threshold_bytes else ["m.onnx", "m.onnx.data"])
    x = RNG.normal(size=(4, 3)).astype(np.float32)
    np.testing.assert_allclose(
        run(open_session(files[0]), {"x": x})["y"], x @ np.tile(WEIGHT, (1, 100)), rtol=1e-5, atol=1e-6
    )


def test_shapes_of_weights_are_written_once(tmp_path: Path) -> None:
    """With the weight: no value_info repeats them. The model in memory keeps them, and who reads the file has them."""
    model = affine()
    files = model.save(tmp_path / "m.onnx")
    assert not onnx.load(files[0]).graph.value_info
    assert list(model.graph.initializers["w"].shape or ()) == [3, 2]
    assert list(model_module.read_graph(files[0]).initializers["w"].shape or ()) == [3, 2]


def test_external_weights_are_taken_along(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model read with external data is whole again when it is saved elsewhere."""
    monkeypatch.setattr(model_module, "EXTERNAL_DATA_THRESHOLD_BYTES", 0)
    big = affine()
    big.graph.initializers["w"].const_value = ir.tensor(np.tile(WEIGHT, (1, 100)))
    (tmp_path / "a").mkdir()
    files = big.save(tmp_path / "a" / "m.onnx")
    monkeypatch.undo()
    (tmp_path / "b").mkdir()
    copies = Model(ir.load(files[0]), big.provenance).save(tmp_path / "b" / "m.onnx")
    for file in files:
        file.unlink()
    assert run(open_session(copies[0]), {"x": np.ones((1, 3), np.float32)})["y"].shape == (1, 200)


def test_unknown_operator_names_itself() -> None:
    """The error names the operator, and no path of the machine."""
    with pytest.raises(UnsupportedOperatorError, match="Frobnicate") as error, session_of(affine("Frobnicate")):
        pass
    assert error.value.metadata["op_type"] == "Frobnicate"
    assert "/tmp" not in error.value.message


def test_wrong_feeds_are_explained() -> None:
    """A feed of the wrong shape ends in ModelNotRunnableError."""
    with session_of(affine()) as session, pytest.raises(ModelNotRunnableError):
        run(session, {"x": np.ones((1, 5), np.float32)})
