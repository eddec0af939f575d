"""How a task ended on a node, as the server hears of it."""

from __future__ import annotations

import pytest
from modelpress_protos.internal.v1 import site_pb2, worker_pb2
from modelpress_protos.v1 import job_service_pb2
from modelpress_server import errors
from modelpress_server.executors.base import WorkerLostError, WorkerUnavailableError
from modelpress_server.sites.base import Postpone, PostponedError, TaskFailedError
from modelpress_server.sites.endings import ending_of, result_of


def there_and_back(error: BaseException) -> BaseException:
    """What the server raises where a node raised this."""
    sent = site_pb2.Ending.FromString(ending_of(error).SerializeToString())
    with pytest.raises(Exception) as raised:  # noqa: PT011  # which one it is, is what the tests are about
        result_of(sent)
    return raised.value


def test_results_arrive() -> None:
    """What a task made or found is the same on both sides."""
    made = site_pb2.Compressed(made_by=b"kind", artifacts=[job_service_pb2.Artifact(candidate="a1")])
    assert result_of(ending_of(made)) == made
    found = worker_pb2.InspectResult(format=1)  # type: ignore[arg-type]
    assert result_of(ending_of(found)) == found


def test_a_lost_worker_arrives() -> None:
    """With its reason, and whether it was the task's doing."""
    lost = there_and_back(WorkerLostError("WORKER_OUT_OF_MEMORY", "Too much.", own=False))
    assert isinstance(lost, WorkerLostError)
    assert (lost.reason, str(lost), lost.own) == ("WORKER_OUT_OF_MEMORY", "Too much.", False)


@pytest.mark.parametrize(
    ("raised", "why"),
    [
        (PostponedError(Postpone.MORE_ROOM), Postpone.MORE_ROOM),
        (PostponedError(Postpone.DAMAGE), Postpone.DAMAGE),
        (WorkerUnavailableError("None."), Postpone.HOST),
        (errors.StorageFullError("Full."), Postpone.ROOM),
        (errors.ServerBusyError("Busy.", retry_after_s=1.0), Postpone.BUSY),
        (MemoryError(), Postpone.BUSY),
    ],
)
def test_what_a_node_lacks_is_no_fault_of_the_task(raised: Exception, why: Postpone) -> None:
    """A full disk, or no worker, puts the task off, as on the server's own machine."""
    error = there_and_back(raised)
    assert isinstance(error, PostponedError)
    assert error.why is why


def test_faults_arrive_with_their_status() -> None:
    """The user's own, one of the service, and a bug, of which nothing but an incident number goes out."""
    own = errors.make_status(errors.grpc.StatusCode.INVALID_ARGUMENT, "UNSUPPORTED_FORMAT", "No format of ours.")
    failed = there_and_back(TaskFailedError(own))
    assert isinstance(failed, TaskFailedError)
    assert failed.status == own
    missing = there_and_back(errors.BlobMissingError("It is gone."))
    assert isinstance(missing, TaskFailedError)
    assert errors.reason_of(missing.status) == "BLOB_MISSING"
    bug = there_and_back(RuntimeError("/home/somebody"))
    assert isinstance(bug, TaskFailedError)
    assert errors.reason_of(bug.status) == "INTERNAL"
    assert "somebody" not in str(bug.status)
