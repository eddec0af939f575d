"""onnxruntime on an NVIDIA GPU. Inputs and outputs lie in the CPU's memory, and times hold their way there and back."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import onnxruntime as ort

from modelpress_compression.backends.cpu import OnnxRuntime, OnnxRuntimeRunner
from modelpress_compression.errors import ModelNotRunnableError
from modelpress_compression.runtime import EXECUTION_PROVIDER, Provider, open_comparable, open_session
from modelpress_compression.target import DEVICES, Target

CUDA = "CUDAExecutionProvider"
_PACKAGES = ("onnxruntime", "onnxruntime-gpu")  # of the same files


@dataclass(frozen=True)
class Cuda:
    """See `base.Backend`. `precise`: float32 is not rounded to TF32 in products."""

    precise: bool = False
    label: str = CUDA
    elsewhere: bool = True

    @classmethod
    def of(cls, target: Target) -> Cuda | OnnxRuntime:
        """onnxruntime on the CPU where there is no GPU for it; the backend's remark says so."""
        if problem := DEVICES[target.device].missing or why_without(CUDA):
            return OnnxRuntime(remark=f"Models are measured on the CPU: {problem.rstrip('.')}")
        load_libraries()
        return cls(target.precision == "float32")

    @property
    def remark(self) -> str:
        return "" if self.precise else "CUDA rounds products of float32 to TF32 on GPUs that have it"

    def open(self, path: Path, *, threads: int = 1, comparable: bool = False) -> OnnxRuntimeRunner:
        del threads  # of the CPU, which does next to nothing
        providers = [*self.providers(), EXECUTION_PROVIDER]
        session = open_comparable(path, providers) if comparable else open_session(path, providers=providers)
        return OnnxRuntimeRunner(on_device(session, CUDA))

    def providers(self) -> list[Provider]:
        """onnxruntime's provider with its options."""
        return [(CUDA, {"use_tf32": "0" if self.precise else "1"})]


def why_without(provider: str) -> str:
    """Why this onnxruntime cannot have the provider; empty: it has been built with it."""
    both = [name for name in _PACKAGES if _installed(name)]
    if len(both) > 1:
        return (
            f"{' and '.join(both)} are both installed, and each has overwritten files of the other: pip uninstall "
            f"{' '.join(both)}, then pip install --no-deps onnxruntime-gpu"
        )
    if provider not in ort.get_available_providers():
        return f"onnxruntime {ort.__version__} was built without {provider}; onnxruntime-gpu has it"
    return ""


def load_libraries() -> None:
    """Those of CUDA and cuDNN that came with pip, which no search path of the system holds."""
    if hasattr(ort, "preload_dlls"):
        ort.preload_dlls()


def on_device(session: ort.InferenceSession, provider: str) -> ort.InferenceSession:
    """The session, if it runs there: onnxruntime takes the CPU without a word where the provider does not start. Raises
    ModelNotRunnableError."""
    if provider in session.get_providers():
        return session
    raise ModelNotRunnableError(
        f"onnxruntime could not start {provider} and would have run the model on the CPU: a library of CUDA, of cuDNN "
        f"or of TensorRT is missing, or the driver is too old. onnxruntime says which in the worker's output."
    )


def _installed(package: str) -> bool:
    try:
        return bool(version(package))
    except PackageNotFoundError:
        return False
