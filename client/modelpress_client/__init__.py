"""Client of a modelpress server: uploads a model, compresses it there, brings back the result and its report.

    from modelpress_client import Client

    with Client("localhost:50051") as client:
        model = client.upload("model.pt", inputs=["x:float32[batch,1,28,28]"])
        job = client.compress(model, recipe="default", data="samples.npz")
        report = job.wait()
        job.download("model.onnx")

Importing the package loads neither grpc nor protobuf; the first use of a name does.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from modelpress_client.async_client import AsyncClient
    from modelpress_client.async_job import AsyncJob
    from modelpress_client.client import Client, Job
    from modelpress_client.errors import (
        AuthenticationError,
        InvalidRecipeError,
        JobCancelledError,
        JobError,
        JobExpiredError,
        JobFailedError,
        MissingExtraError,
        ModelpressError,
        NotFoundError,
        QuotaError,
        ServerError,
        ServerUnreachableError,
        TimedOutError,
        TransferError,
        UnusableInputError,
        UsageError,
    )
    from modelpress_client.inputs import parse_input
    from modelpress_client.report import Report
    from modelpress_client.resources import JobEvent, Model
    from modelpress_client.settings import RetryPolicy, Settings
    from modelpress_client.transfers import TransferProgress

_HOMES = {
    "modelpress_client.async_client": ("AsyncClient",),
    "modelpress_client.async_job": ("AsyncJob",),
    "modelpress_client.client": ("Client", "Job"),
    "modelpress_client.errors": (
        "AuthenticationError",
        "InvalidRecipeError",
        "JobCancelledError",
        "JobError",
        "JobExpiredError",
        "JobFailedError",
        "MissingExtraError",
        "ModelpressError",
        "NotFoundError",
        "QuotaError",
        "ServerError",
        "ServerUnreachableError",
        "TimedOutError",
        "TransferError",
        "UnusableInputError",
        "UsageError",
    ),
    "modelpress_client.inputs": ("parse_input",),
    "modelpress_client.report": ("Report",),
    "modelpress_client.resources": ("JobEvent", "Model"),
    "modelpress_client.settings": ("RetryPolicy", "Settings"),
    "modelpress_client.transfers": ("TransferProgress",),
}
_HOME_OF = {name: module for module, names in _HOMES.items() for name in names}

__all__ = [
    "AsyncClient",
    "AsyncJob",
    "AuthenticationError",
    "Client",
    "InvalidRecipeError",
    "Job",
    "JobCancelledError",
    "JobError",
    "JobEvent",
    "JobExpiredError",
    "JobFailedError",
    "MissingExtraError",
    "Model",
    "ModelpressError",
    "NotFoundError",
    "QuotaError",
    "Report",
    "RetryPolicy",
    "ServerError",
    "ServerUnreachableError",
    "Settings",
    "TimedOutError",
    "TransferError",
    "TransferProgress",
    "UnusableInputError",
    "UsageError",
    "parse_input",
]


def __getattr__(name: str) -> object:
    home = _HOME_OF.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(home), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME_OF})
