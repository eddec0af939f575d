"""Models: registration, inspection, listing, changes."""

from __future__ import annotations

import uuid
from typing import Any

import grpc
import pytest
from google.protobuf.field_mask_pb2 import FieldMask
from google.rpc import error_details_pb2
from modelpress_protos.v1 import common_pb2, model_service_pb2
from server_harness import PROJECT, Client, Running, Serve, digest_of, failing, until

Model = model_service_pb2.Model
Create = model_service_pb2.CreateModelRequest


async def settled(client: Client, model: Any) -> Any:
    """The model once its inspection is over."""

    async def inspected() -> Any:
        found = await client.models.GetModel(model_service_pb2.GetModelRequest(name=model.name))
        return found if found.state != Model.STATE_PROCESSING else None

    return await until(inspected)


async def listed(client: Client, **fields: Any) -> Any:
    return await client.models.ListModels(model_service_pb2.ListModelsRequest(parent=PROJECT, **fields))


async def test_becomes_active_with_its_inspection(running: Running) -> None:
    """PROCESSING at first; then what the worker found. The display name is the main file's."""
    created = await running.client.model()
    assert (created.state, created.display_name) == (Model.STATE_PROCESSING, "model.onnx")
    model = await settled(running.client, created)
    assert (model.state, model.format) == (Model.STATE_ACTIVE, common_pb2.MODEL_FORMAT_ONNX)
    assert model.inspection.parameter_count == 7
    assert model.inspection.op_counts["Conv"] == 2
    assert model.etag != created.etag
    assert list((running.settings.data_dir / "work").iterdir()) == []


@pytest.mark.parametrize(
    ("behaviour", "reason"),
    [("refuse", "UNSUPPORTED_FORMAT"), ("blocking", "MODEL_REJECTED"), ("timeout", "WORKER_TIMEOUT")],
)
async def test_a_refused_model_says_why(running: Running, behaviour: str, reason: str) -> None:
    """REJECTED with the reason; a job for it is FAILED_PRECONDITION with the finding."""
    model = await settled(running.client, await running.client.model(inspect=behaviour))
    assert model.state == Model.STATE_REJECTED
    info = error_details_pb2.ErrorInfo()
    assert model.error.details[0].Unpack(info)
    assert info.reason == reason
    failure = await failing(running.client.job(model))
    assert (failure.code, failure.reason) == (grpc.StatusCode.FAILED_PRECONDITION, "MODEL_REJECTED")
    assert failure.metadata["finding"] == model.error.message


async def test_the_same_content_is_inspected_once(running: Running) -> None:
    """A second model of the same files is ACTIVE at once; with other input hints it is inspected again."""
    first = await settled(running.client, await running.client.model())
    second = await running.client.model()
    assert second.name != first.name
    assert (second.state, second.inspection) == (Model.STATE_ACTIVE, first.inspection)
    hinted = Model(files=first.files, input_hints=[common_pb2.TensorSpec(name="x", dtype="float32")])
    third = await running.client.models.CreateModel(Create(parent=PROJECT, model=hinted))
    assert third.state == Model.STATE_PROCESSING


async def test_request_id_makes_one_model(running: Running) -> None:
    """The same request id gives the same model; with another payload it is refused."""
    digest = await running.client.upload(b"{}")
    request = Create(parent=PROJECT, request_id=str(uuid.uuid4()))
    request.model.files.add(path="m.onnx", digest=digest)
    first = await running.client.models.CreateModel(request)
    assert (await running.client.models.CreateModel(request)).name == first.name
    request.model.display_name = "another"
    failure = await failing(running.client.models.CreateModel(request))
    assert (failure.code, failure.reason) == (grpc.StatusCode.INVALID_ARGUMENT, "REQUEST_ID_REUSED")
    assert len((await listed(running.client)).models) == 1


async def test_blobs_must_be_there_and_this_projects(running: Running) -> None:
    """Blobs that the project does not have: FAILED_PRECONDITION, also where another project has them."""
    other = await running.client.model("projects/other")
    model = Model(files=other.files)
    failure = await failing(running.client.models.CreateModel(Create(parent=PROJECT, model=model)))
    assert (failure.code, failure.reason) == (grpc.StatusCode.FAILED_PRECONDITION, "BLOB_MISSING")
    assert failure.metadata["sha256"] == other.files[0].digest.sha256.hex()


async def test_every_violation_is_listed(running: Running) -> None:
    """Paths that leave the folder, wrong digests, labels and hints: all at once, each with its path."""
    model = Model(display_name="a\x07", labels={"UPPER": "x"})
    paths = ["../x", "/x", "a//b", "a\\b", "a\0b", "", "é" * 121, "e\u0301", "ok", "ok", "."]
    for path in paths:
        model.files.add(path=path, digest=digest_of(b""))
    model.input_hints.add(name="x", dtype="Float 32").shape.add(value=-1)
    failure = await failing(running.client.models.CreateModel(Create(parent=PROJECT, model=model, request_id="no")))
    assert failure.reason == "INVALID_FIELDS"
    fields = {item.field for item in failure.detail(error_details_pb2.BadRequest).field_violations}
    assert {f"model.files[{index}].path" for index in (0, 1, 2, 3, 4, 5, 6, 7, 10)} <= fields
    assert "model.files[8].path" not in fields
    assert {"model.files", "model.display_name", "model.labels['UPPER']", "request_id"} <= fields
    assert {"model.input_hints[0].dtype", "model.input_hints[0].shape[0]"} <= fields


async def test_a_flood_of_violations_stays_under_4_kib(running: Running) -> None:
    """The status of a call never grows over what gRPC carries; it says how many more there are."""
    model = Model()
    for _ in range(1000):
        model.files.add(path="../" + "x" * 200)
    failure = await failing(running.client.models.CreateModel(Create(parent=PROJECT, model=model)))
    last = failure.detail(error_details_pb2.BadRequest).field_violations[-1]
    assert last.description.endswith("more")


async def test_lists_pages_and_filters(running: Running) -> None:
    """Newest first, in pages; by state and by labels; tokens hold only for their own list."""
    made = [await running.client.model(labels={"team": f"t{index % 2}", "n": str(index)}) for index in range(5)]
    names = [model.name for model in reversed(made)]
    first = await listed(running.client, page_size=2)
    second = await listed(running.client, page_size=2, page_token=first.next_page_token)
    third = await listed(running.client, page_size=2, page_token=second.next_page_token)
    assert [model.name for page in (first, second, third) for model in page.models] == names
    assert third.next_page_token == ""
    found = await listed(running.client, filter='labels.team = "t0" AND labels.n = "2"')
    assert [model.name for model in found.models] == [made[2].name]
    for model in made:
        await settled(running.client, model)
    assert len((await listed(running.client, filter="state = ACTIVE")).models) == 5
    assert len((await listed(running.client, filter="state = REJECTED")).models) == 0
    other_list = {"page_token": first.next_page_token, "filter": "state=ACTIVE"}
    for wrong in ({"page_token": "x"}, {"page_size": -1}, other_list):
        assert (await failing(listed(running.client, **wrong))).reason == "INVALID_FIELDS"
    for text in ("state = MAYBE", "state", "size = 3", "state = ACTIVE OR", 'labels.a = "b'):
        assert (await failing(listed(running.client, filter=text))).reason == "INVALID_FIELDS"


async def test_update_checks_the_etag(running: Running) -> None:
    """display_name and labels change, one at a time where a mask says so; a stale etag is ABORTED."""
    model = await settled(running.client, await running.client.model(labels={"a": "1"}))
    change = Model(name=model.name, display_name="new", etag=model.etag)
    request = model_service_pb2.UpdateModelRequest(model=change, update_mask=FieldMask(paths=["display_name"]))
    updated = await running.client.models.UpdateModel(request)
    assert (updated.display_name, dict(updated.labels)) == ("new", {"a": "1"})
    failure = await failing(running.client.models.UpdateModel(request))
    assert (failure.code, failure.reason) == (grpc.StatusCode.ABORTED, "ETAG_MISMATCH")
    change = Model(name=model.name, labels={"b": "2"})
    request = model_service_pb2.UpdateModelRequest(model=change, update_mask=FieldMask(paths=["labels"]))
    assert dict((await running.client.models.UpdateModel(request)).labels) == {"b": "2"}
    assert len((await listed(running.client, filter='labels.a = "1"')).models) == 0
    request.update_mask.paths.append("state")
    assert (await failing(running.client.models.UpdateModel(request))).reason == "INVALID_FIELDS"


async def test_delete_and_other_projects(running: Running) -> None:
    """A deleted model is NOT_FOUND, and so is every model through another project's name."""
    model = await settled(running.client, await running.client.model())
    stolen = model_service_pb2.DeleteModelRequest(name=model.name.replace("default", "other"))
    assert (await failing(running.client.models.DeleteModel(stolen))).code == grpc.StatusCode.NOT_FOUND
    stale = model_service_pb2.DeleteModelRequest(name=model.name, etag="v0")
    assert (await failing(running.client.models.DeleteModel(stale))).reason == "ETAG_MISMATCH"
    await running.client.models.DeleteModel(model_service_pb2.DeleteModelRequest(name=model.name, etag=model.etag))
    failure = await failing(running.client.models.GetModel(model_service_pb2.GetModelRequest(name=model.name)))
    assert (failure.code, failure.reason) == (grpc.StatusCode.NOT_FOUND, "RESOURCE_NOT_FOUND")
    for name in ("projects/default/models/..", "projects/default/jobs/x", "models/x", model.name + "/x"):
        failure = await failing(running.client.models.GetModel(model_service_pb2.GetModelRequest(name=name)))
        assert failure.code == grpc.StatusCode.INVALID_ARGUMENT


async def test_waiting_is_told_apart(running: Running) -> None:
    """Behind another inspection, while the worker is started, and while it looks; nothing once it has ended."""
    running.executor.inspection_gate.clear()
    running.executor.worker_gate.clear()
    first, second = await running.client.model(note="1"), await running.client.model(note="2")

    async def stage(model: Any) -> Any:
        found = await running.client.models.GetModel(model_service_pb2.GetModelRequest(name=model.name))
        return found.inspection_stage, found.inspections_ahead if found.HasField("inspections_ahead") else None

    async def becomes(model: Any, expected: Any) -> bool:
        return await stage(model) == expected

    await until(lambda: becomes(first, (model_service_pb2.INSPECTION_STAGE_STARTING_WORKER, None)))
    assert await stage(second) == (model_service_pb2.INSPECTION_STAGE_QUEUED, 1)
    running.executor.worker_gate.set()
    await until(lambda: becomes(first, (model_service_pb2.INSPECTION_STAGE_RUNNING, None)))
    running.executor.inspection_gate.set()
    for model in (first, second):
        await settled(running.client, model)
        assert await stage(model) == (model_service_pb2.INSPECTION_STAGE_UNSPECIFIED, None)


async def test_what_is_told_after_the_end_holds_nothing_up(running: Running) -> None:
    """A worker that is let go on after its end, by one that has measured, takes the place of no inspection."""
    await settled(running.client, await running.client.model(note="first"))
    running.executor.tell_late()
    await settled(running.client, await running.client.model(note="second"))


async def test_inspection_goes_on_after_a_restart(serve: Serve) -> None:
    """A model that was being inspected when the server stopped is inspected by the next one."""
    async with serve() as running:
        running.executor.inspection_gate.clear()
        model = await running.client.model()
        await until(lambda: running.executor.limits)  # the executor has it
    async with serve() as running:
        assert (await settled(running.client, model)).state == Model.STATE_ACTIVE


async def test_a_page_fits_a_grpc_message(running: Running) -> None:
    """Models with large manifests: pages are shorter than asked for, and nothing is left out."""
    digest = await running.client.upload(b"{}")
    files = [common_pb2.FileEntry(path=f"{index:04}" + "x" * 230, digest=digest) for index in range(1000)]
    names = []
    for _ in range(14):
        request = Create(parent=PROJECT, model=Model(files=files))
        names.append((await running.client.models.CreateModel(request)).name)
    first = await listed(running.client, page_size=1000)
    assert 0 < len(first.models) < 14
    rest = await listed(running.client, page_size=1000, page_token=first.next_page_token)
    assert [model.name for model in [*first.models, *rest.models]] == names[::-1]
