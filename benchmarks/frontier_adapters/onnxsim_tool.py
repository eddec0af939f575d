"""onnxsim 0.8: simplification, and the quantizers and pruners that it has by now."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import onnx
import onnxsim
from points import Job, Point, main

Model = onnx.ModelProto


def simplified(job: Job) -> Model:
    """Without folding where that fails: it does on branches that read values from outside."""
    model = onnx.load(job.model)
    try:
        return onnxsim.simplify(model)[0]
    except RuntimeError as error:
        print("simplify failed:", error)
        return onnxsim.simplify(model, skip_constant_folding=True)[0]


def made(job: Job, make: Callable[..., Model], *, data: bool = False, **options: Any) -> None:
    """What `make` makes of the simplified model. `data`: it calibrates."""
    if data:
        options["calibration_data"] = job.feeds()
    onnx.save(make(simplified(job), **options), job.result)


def refined(job: Job, refine: Callable[..., Model]) -> None:
    """4-bit weights, then one of its methods that rounds them by the data."""
    model = simplified(job)
    rough = onnxsim.quantize_weight_only_int4(model)
    onnx.save(refine(model, rough, calibration_data=job.feeds()), job.result)


def corrected(job: Job, **options: Any) -> None:
    """Static after cross-layer equalization, with its bias correction."""
    model = onnxsim.cross_layer_equalize(simplified(job))
    quantized = onnxsim.quantize_static(model, calibration_data=job.feeds(), **options)
    onnx.save(onnxsim.correct_bias(model, quantized, calibration_data=job.feeds()), job.result)


def smooth(job: Job, make: Callable[..., Model]) -> None:
    onnx.save(make(onnxsim.apply_smoothquant(simplified(job), calibration_data=job.feeds())), job.result)


def pruned(job: Job, sparsity: float, *then: Callable[[Model], Model]) -> None:
    model = onnxsim.apply_structured_wanda_pruning(
        simplified(job), calibration_data=job.feeds(), sparsity=sparsity, global_sparsity=True
    )
    for step in then:
        model = step(model)
    onnx.save(model, job.result)


POINTS: dict[str, Point] = {
    "simplified": partial(made, make=lambda model: model),
    "dynamic": partial(made, make=onnxsim.quantize_dynamic),
    "dynamic, fused": partial(made, make=onnxsim.quantize_dynamic_matmul_integer_to_float),
    "dynamic, smoothed": partial(smooth, make=onnxsim.quantize_dynamic_matmul_integer_to_float),
    "static, minmax": partial(made, make=onnxsim.quantize_static, data=True, method="minmax"),
    "static, entropy": partial(made, make=onnxsim.quantize_static, data=True, method="entropy"),
    "static, percentile": partial(made, make=onnxsim.quantize_static, data=True, method="percentile"),
    "static, minmax, full graph": partial(
        made, make=onnxsim.quantize_static, data=True, method="minmax", full_graph=True
    ),
    "static, percentile, full graph": partial(
        made, make=onnxsim.quantize_static, data=True, method="percentile", full_graph=True
    ),
    "static, minmax, equalized and corrected": partial(corrected, method="minmax"),
    "QOperator, minmax": partial(made, make=onnxsim.quantize_qoperator, data=True, method="minmax"),
    "chosen by itself": partial(made, make=onnxsim.quantize_auto, data=True),
    "float16": partial(made, make=onnxsim.quantize_fp16),
    "weights in 8 bits": partial(made, make=onnxsim.quantize_weight_only),
    "weights in 8 bits, blocks": partial(made, make=onnxsim.quantize_weight_only_int8_block),
    "weights in 4 bits": partial(made, make=onnxsim.quantize_weight_only_int4),
    "weights in 4 bits, GPTQ": partial(refined, refine=onnxsim.apply_gptq),
    "weights in 4 bits, MatMulNBits": partial(made, make=onnxsim.quantize_weight_only_matmul_nbits),
    "weights in 4 bits, HQQ": partial(made, make=onnxsim.quantize_weight_only_int4_hqq),
    "channels pruned by 10 %": partial(pruned, sparsity=0.1),
    "channels pruned by 25 %": partial(pruned, sparsity=0.25),
    "channels pruned by 10 %, weights in 8 bits": lambda job: pruned(job, 0.1, onnxsim.quantize_weight_only),
}

if __name__ == "__main__":
    main(POINTS)
