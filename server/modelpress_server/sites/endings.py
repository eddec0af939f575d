"""How a task ended, as a message from a node to the server: what a Site returns or raises, there and back."""

from __future__ import annotations

import logging

from google.rpc import status_pb2
from modelpress_protos.internal.v1 import site_pb2, worker_pb2

from modelpress_server import errors
from modelpress_server.executors.base import WorkerLostError
from modelpress_server.sites.base import Postpone, PostponedError, TaskFailedError, postponement_of

logger = logging.getLogger(__name__)


def ending_of(result: site_pb2.Compressed | worker_pb2.InspectResult | BaseException) -> site_pb2.Ending:
    """The message for what a Site returned or raised."""
    if isinstance(result, site_pb2.Compressed):
        return site_pb2.Ending(compressed=result)
    if isinstance(result, worker_pb2.InspectResult):
        return site_pb2.Ending(inspected=result)
    if isinstance(result, WorkerLostError):
        return site_pb2.Ending(lost=site_pb2.Lost(reason=result.reason, message=str(result), own=result.own))
    if (why := postponement_of(result)) is not None:
        return site_pb2.Ending(postponed=why.name)
    return site_pb2.Ending(failed=_status_of(result))


def _status_of(error: BaseException) -> status_pb2.Status:
    if isinstance(error, TaskFailedError):
        return error.status
    if isinstance(error, errors.ServiceError):
        return errors.status_of(error)
    internal = errors.InternalError()
    logger.error("incident %s in a task", internal.incident, exc_info=error)
    return errors.status_of(internal)


def result_of(ending: site_pb2.Ending) -> site_pb2.Compressed | worker_pb2.InspectResult:
    """What the message says was returned. Raises what it says was raised."""
    kind = ending.WhichOneof("ending")
    if kind == "compressed":
        return ending.compressed
    if kind == "inspected":
        return ending.inspected
    if kind == "lost":
        raise WorkerLostError(ending.lost.reason, ending.lost.message, own=ending.lost.own)
    if kind == "postponed" and ending.postponed in Postpone.__members__:
        raise PostponedError(Postpone[ending.postponed])
    raise TaskFailedError(ending.failed)
