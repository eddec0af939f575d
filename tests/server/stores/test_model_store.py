"""What every ModelStore does, tried on SQLite and on PostgreSQL."""

from __future__ import annotations

import asyncio

import pytest
from modelpress_protos.v1 import model_service_pb2
from modelpress_server import errors
from modelpress_server.stores.database import Database
from modelpress_server.stores.models import ModelRecord
from store_rows import Stores

ACTIVE = model_service_pb2.Model(state=model_service_pb2.Model.STATE_ACTIVE)


@pytest.fixture
async def both(database: Database) -> tuple[Stores, Stores]:
    """Two servers that live."""
    one, other = Stores(database), Stores(database)
    await one.live()
    await other.live()
    return one, other


async def claim(stores: Stores, *busy: str) -> ModelRecord | None:
    return await stores.models.claim_inspection(busy, list, stores.server_id)


async def test_one_server_inspects_a_model(both: tuple[Stores, Stores]) -> None:
    """A model that a living server inspects is left to it; a dead one's is taken up; an inspected one is nobody's."""
    one, other = both
    model = await one.model()
    taken = await claim(one)
    assert taken is not None
    assert (taken.id, taken.owner) == (model.id, one.server_id)
    assert await claim(other) is None
    assert await claim(one, model.id) is None
    again = await claim(one)
    assert again is not None  # it was put off, and is its own still
    await one.servers.remove(one.server_id)
    assert await claim(other) is not None
    await other.models.finish_inspection(model.id, ACTIVE)
    assert await claim(other) is None
    assert (await one.models.get("p", model.id)).message.state == ACTIVE.state


async def test_models_are_claimed_once(both: tuple[Stores, Stores]) -> None:
    """Several that look at the same time never inspect the same model."""
    one, other = both
    for number in range(4):
        await one.model(b"%d" % number)
    found = await asyncio.gather(claim(one), claim(other))
    ids = [model.id for model in found if model is not None]
    assert len(ids) == len(set(ids)) >= 1


async def test_a_job_inspects_its_model(both: tuple[Stores, Stores]) -> None:
    """While a job of the model runs anywhere, nobody inspects it besides."""
    one, other = both
    model = await one.model()
    await one.job(model)
    await one.claimed()
    assert await claim(other) is None


async def test_changes_and_deletion(both: tuple[Stores, Stores]) -> None:
    """A change is made under an etag; blobs that are not there are refused; a model of one project is not another's."""
    one, other = both
    model = await one.model()
    changed = await one.models.update("p", model.id, "", lambda message: setattr(message, "display_name", "new"))
    assert changed.message.display_name == "new"
    with pytest.raises(errors.EtagMismatchError):
        await other.models.update("p", model.id, model.to_message().etag, lambda message: None)
    with pytest.raises(errors.ResourceNotFoundError):
        await other.models.get("q", model.id)
    await other.models.delete("p", model.id, changed.to_message().etag)
    with pytest.raises(errors.ResourceNotFoundError):
        await one.models.get("p", model.id)
