"""ONNX files, and ONNX graphs that an exporter made, into a `Model`."""

from __future__ import annotations

import os
from collections.abc import Collection, Sequence
from pathlib import Path

import onnx
import onnx_ir
from google.protobuf.message import DecodeError

from modelpress_compression import mapped
from modelpress_compression.errors import (
    InvalidInputsError,
    ModelNotRunnableError,
    RejectedModelError,
    UnsupportedFormatError,
    UnsupportedOperatorError,
)
from modelpress_compression.graph.metadata import clear_debug_metadata
from modelpress_compression.graph.precision import compute_in_float32, computes_in
from modelpress_compression.graph.read import constant_tensor, is_op
from modelpress_compression.graph.shapes import infer_shapes
from modelpress_compression.loaders.formats.refusals import refused
from modelpress_compression.loaders.masked_rows import hide_whole_rows
from modelpress_compression.loaders.normalize import name_nodes, normalize, root_cause
from modelpress_compression.loaders.onnx_check import check_external_data, check_graph, check_operators
from modelpress_compression.loaders.onnx_old import raise_from_before_7
from modelpress_compression.loaders.onnx_sparse import write_out_sparse
from modelpress_compression.loaders.source import Source
from modelpress_compression.model import Model, Provenance, forget_maps
from modelpress_compression.specs import TensorSpec, check_elements

_MAX_PROTOBUF_BYTES = 2**31 - 1

_UNREADABLE = (
    onnx_ir.serde.SerdeError,
    ValueError,
    TypeError,
    KeyError,
    AttributeError,
    NotImplementedError,
    RecursionError,
)

Dim = int | str | None


def load_onnx(source: Source, specs: Sequence[TensorSpec]) -> Model:
    """An ONNX file with its data files. Raises as `loaders.load`."""
    proto = _parse(source.main)
    data = check_external_data(proto, source)
    sparse = write_out_sparse(proto)
    ir = _to_ir(proto, source.main.parent)
    mapped.resolve_own_file(ir, source.main)
    del proto
    model = normalize(Model(ir, source.provenance("onnx", data), _sparse_note(sparse)))
    model = apply_specs(model, specs)
    check_elements(model.inputs)
    model = runnable(model)
    _check_bfloat16(model)
    return model


def runnable(model: Model) -> Model:
    """Says what onnxruntime refuses, now rather than in the middle of a job. What it does not compute in bfloat16,
    float64 or float16 is computed in float32.

    Raises UnsupportedOperatorError, ModelNotRunnableError.
    """
    refusal = _refusal(model)
    dtypes = (*(_lacking_on_cpu(model) if refusal else ()), *_crashing_on_cpu(model))
    widened = model.clone()
    if not dtypes or not compute_in_float32(widened, dtypes):
        if refusal is not None:
            raise refusal
        return model
    infer_shapes(widened.ir)
    name_nodes(widened)
    if (refusal := _refusal(widened)) is not None:
        raise refusal
    names = " and ".join(dtype.name.lower().replace("double", "float64") for dtype in dtypes)
    return widened.with_warnings(
        f"The model computes in {names}, in which onnxruntime does not run it on CPU. It computes in float32 here and "
        f"in the result: the outputs are those of {names} up to rounding, and inputs and outputs keep their types."
    )


def may_need_float32(model: Model) -> bool:
    """Whether `runnable` may change the model."""
    return bool(_lacking_on_cpu(model) or _crashing_on_cpu(model))


def _refusal(model: Model) -> UnsupportedOperatorError | ModelNotRunnableError | None:
    from modelpress_compression.runtime import session_of

    try:
        with session_of(model, optimize=False):
            return None
    except (UnsupportedOperatorError, ModelNotRunnableError) as error:
        return error


def _lacking_on_cpu(model: Model) -> tuple[onnx_ir.DataType, ...]:
    """The types that the model computes in for which onnxruntime lacks operators on CPU: it has no arithmetic in
    bfloat16, and no convolutions, say, in float64."""
    lacking = (onnx_ir.DataType.BFLOAT16, onnx_ir.DataType.DOUBLE)
    return tuple(dtype for dtype in lacking if computes_in(model, (dtype,)))


def _crashing_on_cpu(model: Model) -> tuple[onnx_ir.DataType, ...]:
    """float16 where a product reads a Transpose that moves the first axis, as attention and LSTM with `batch_first` do:
    onnxruntime 1.31 fuses the two, and the process ends with SIGSEGV when a session is opened with optimizations."""
    crashes = any(
        node.op_type == "Transpose"
        and node.outputs[0].dtype == onnx_ir.DataType.FLOAT16
        and (node.attributes.get_ints("perm", None) or (0,))[0] != 0
        and any(is_op(user, "MatMul") for user in node.outputs[0].consumers())
        for node in model.nodes()
    )
    return (onnx_ir.DataType.FLOAT16,) if crashes else ()


def _check_bfloat16(model: Model) -> None:
    """Numbers of an input or output must come in and out of onnxruntime as NumPy's, which has no bfloat16."""
    for what, specs in (("Input", model.inputs), ("Output", model.outputs)):
        for spec in specs:
            if spec.dtype == "bfloat16":
                raise ModelNotRunnableError(
                    f"{what} {spec.name!r} is bfloat16, which onnxruntime neither takes from Python nor gives back. "
                    f"Export the model with float32 inputs and outputs; its weights may stay bfloat16."
                )


def _sparse_note(count: int) -> tuple[str, ...]:
    if not count:
        return ()
    return (
        f"{count} sparse constants of the model are written out as dense ones, as onnxruntime does when it loads them: "
        f"every figure of the original is that of the dense model, which is larger than the file.",
    )


def from_exporter(path: str | os.PathLike[str], provenance: Provenance) -> Model:
    """The file that an exporter of ours wrote; its inputs and outputs are as the exporter named them."""
    path = Path(path)
    # In memory: the exporter's folder is gone before the model is.
    ir = _to_ir(_parse(path), path.parent)
    mapped.resolve_own_file(ir, path)
    mapped.load_all(ir)
    clear_debug_metadata(ir)  # the exporter's, not the user's
    model = normalize(Model(ir, provenance))
    hide_whole_rows(model)
    return model


def _parse(path: Path) -> onnx.ModelProto:
    if path.stat().st_size > _MAX_PROTOBUF_BYTES:
        raise refused("PROTOBUF_SIZE")
    try:
        # Without its external data: their paths are not checked yet.
        proto = mapped.read(path)
    except (DecodeError, ValueError, RuntimeError) as error:
        raise UnsupportedFormatError(
            "The file is no readable ONNX model: it is damaged, cut short or of another format."
        ) from error
    if not proto.HasField("graph") or not proto.ir_version:
        raise UnsupportedFormatError("The file is no ONNX model: it holds no graph.")
    check_graph(proto)
    return proto


def _to_ir(proto: onnx.ModelProto, folder: Path) -> onnx_ir.Model:
    """The graph. `proto` is changed: onnx_ir knows no maps, and converters know nothing before operator set 7."""
    raise_from_before_7(proto)
    check_operators(proto)
    forget_maps(proto)
    try:
        ir = onnx_ir.from_proto(proto)
    except _UNREADABLE as error:
        raise RejectedModelError(
            f"The ONNX graph is not valid: {root_cause(error)}", finding="INVALID_GRAPH"
        ) from error
    onnx_ir.external_data.set_base_dir(ir.graph, folder)
    return ir


def apply_specs(model: Model, specs: Sequence[TensorSpec]) -> Model:
    """The model with its dynamic dimensions named, or fixed, as the specs say. Raises InvalidInputsError, also where
    neither a spec nor the model says how many dimensions an input has."""
    have = {spec.name: spec for spec in model.inputs}
    if len(specs) == 1 and len(have) == 1 and specs[0].name not in have:
        # One input is meant, whatever it is called: exporters rename inputs.
        only = next(iter(have.values()))
        specs = [TensorSpec(only.name, specs[0].dtype, specs[0].shape)]
    _check_ranks(model, {spec.name for spec in specs})
    if not specs:
        return model
    renamed: dict[str, Dim] = {}
    for spec in specs:
        if spec.name not in have:
            raise InvalidInputsError(f"The model has no input {spec.name!r}; it has {_listed(model)}.")
        _match(have[spec.name], spec, renamed, _listed(model))
    model = model.clone()
    _rename(model, renamed)
    for value in model.graph.inputs:
        for spec in specs:
            if value.name == spec.name:
                known = spec.shape if value.shape is None else have[spec.name].shape
                value.shape = onnx_ir.Shape(
                    new if new is not None else old for old, new in zip(known, spec.shape, strict=True)
                )
    infer_shapes(model.ir)
    return model


def _check_ranks(model: Model, told: Collection[str]) -> None:
    for value in model.graph.inputs:
        if value.shape is None and isinstance(value.type, onnx_ir.TensorType) and value.name not in told:
            spec = TensorSpec(value.name or "", _spec_dtype(model, value), _likely_dims(value))
            raise InvalidInputsError(
                f"The model does not say how many dimensions its input {value.name!r} has. Say it, with a word for "
                f"each that varies, as --input '{spec}'."
            )


def _spec_dtype(model: Model, value: onnx_ir.Value) -> str:
    return next(spec.dtype for spec in model.inputs if spec.name == value.name)


def _likely_dims(value: onnx_ir.Value) -> tuple[Dim, ...]:
    """As an example: what a layer that reads the input wants."""
    for node in value.consumers():
        weight = constant_tensor(node.inputs[1]) if len(node.inputs) > 1 else None
        extents = weight.shape.numpy() if weight is not None else ()
        if node.op_type == "Conv" and len(extents) > 2:
            channels = extents[1] * node.attributes.get_int("group", 1)
            return ("batch", channels, *("depth", "height", "width")[5 - len(extents) :])
        if node.op_type in ("MatMul", "Gemm") and len(extents) == 2:
            return ("batch", extents[1 if node.attributes.get_int("transB", 0) else 0])
    return ("batch", "length")


def _listed(model: Model) -> str:
    return ", ".join(map(str, model.inputs)) or "none"


def _match(have: TensorSpec, want: TensorSpec, renamed: dict[str, Dim], listed: str) -> None:
    problem = ""
    if have.dtype != want.dtype:
        problem = f"its type is {have.dtype}"
    elif have.shape and len(have.shape) != len(want.shape):
        problem = f"it has {len(have.shape)} dimensions"
    for old, new in zip(have.shape, want.shape, strict=False):
        if isinstance(old, int) and new not in (old, None):
            problem = problem or f"its dimension {old} is fixed"
        if isinstance(old, str) and new is not None and renamed.setdefault(old, new) != new:
            problem = problem or f"the dimensions called {old!r} are one and the same"
    if problem:
        raise InvalidInputsError(f"Input {want} does not fit the model: {problem}; the model takes {listed}.")


def _rename(model: Model, renamed: dict[str, Dim]) -> None:
    for graph in model.graphs():
        values = [*graph.inputs, *(output for node in graph for output in node.outputs)]
        for value in values:
            if value.shape is not None and any(_symbol(dim) in renamed for dim in value.shape):
                value.shape = onnx_ir.Shape(renamed.get(str(_symbol(dim)), dim) for dim in value.shape)


def _symbol(dim: int | onnx_ir.SymbolicDim) -> str | None:
    return None if isinstance(dim, int) else dim.value
