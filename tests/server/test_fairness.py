"""Projects take turns: shares, limits, priorities."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import grpc
import pytest
from modelpress_protos.v1 import model_service_pb2
from modelpress_server.config import Settings, SettingsError
from modelpress_server.fairness import FairShare
from modelpress_server.projects import Projects
from modelpress_server.stores.records import positions_in_turns
from server_harness import Serve, failing, until

A, B = "projects/team-a", "projects/team-b"


class TestShares:
    def order(self, weights: dict[str, float], durations: dict[str, float], count: int) -> str:
        """Who runs, one at a time, while everybody has work waiting."""
        share = FairShare(weights.__getitem__, lambda _: 0)
        found = ""
        for _ in range(count):
            project = share.rank(list(weights))[0]
            share.started(project)
            share.ended(project, durations[project])
            found += project
        return found

    def test_equal_ones_alternate(self) -> None:
        """Jobs of one length: one each in turn."""
        assert self.order({"a": 1.0, "b": 1.0}, {"a": 5.0, "b": 5.0}, 6) == "ababab"

    def test_time_counts_not_jobs(self) -> None:
        """Three jobs of 10 s for each of 30 s."""
        assert self.order({"a": 1.0, "b": 1.0}, {"a": 30.0, "b": 10.0}, 9).count("b") == 6

    def test_weight(self) -> None:
        """Twice the weight is twice the time."""
        assert self.order({"a": 2.0, "b": 1.0}, {"a": 5.0, "b": 5.0}, 9).count("a") == 6

    def test_what_ends_at_once_is_not_free(self) -> None:
        """Works of no length take turns as well."""
        assert self.order({"a": 1.0, "b": 1.0}, {"a": 0.0, "b": 0.0}, 4) == "abab"

    def test_who_was_idle_does_not_make_up_for_it(self) -> None:
        """It comes next, and from then on in turn, not for as long as the others had."""
        share = FairShare(lambda _: 1.0, lambda _: 0)
        for _ in range(100):
            share.rank(["a"])
            share.started("a")
            share.ended("a", 10.0)
        found = ""
        for _ in range(4):
            project = share.rank(["a", "b"])[0]
            share.started(project)
            share.ended(project, 10.0)
            found += project
        assert found in ("baba", "babb", "bbab")

    def test_leaving_the_queue_for_a_moment_pays_no_debt(self) -> None:
        """After a long job with an empty queue behind it, the others' turn comes first all the same."""
        share = FairShare(lambda _: 1.0, lambda _: 0)
        share.started("a")
        share.ended("a", 1000.0)
        for _ in range(5):
            assert share.rank(["a", "b"])[0] == "b"
            share.started("b")
            share.ended("b", 10.0)

    def test_the_least_under_way_comes_first(self) -> None:
        """With several places, one that has a job running lets the other go first, and its limit holds."""
        share = FairShare(lambda _: 1.0, {"a": 2, "b": 1}.__getitem__)
        share.started("a")
        assert share.rank(["a", "b"]) == ["b", "a"]
        share.started("b")
        assert share.rank(["a", "b"]) == ["a"]
        share.started("a")
        assert share.rank(["a", "b"]) == []

    def test_positions(self) -> None:
        """Each project's queue in its order; longer ones wait for the others' turns."""
        assert positions_in_turns([("a", "a0"), ("a", "a1"), ("a", "a2")]) == {"a0": 0, "a1": 1, "a2": 2}
        found = positions_in_turns([("a", "a0"), ("a", "a1"), ("a", "a2"), ("b", "b0")])
        assert found == {"a0": 0, "a1": 2, "a2": 3, "b0": 0}


async def test_another_projects_first_job_is_next(serve: Serve) -> None:
    """Whatever a project has queued: when the job that runs has ended, the other project's is started."""
    async with serve(max_queued_jobs=1000) as running:
        client, executor = running.client, running.executor
        blocking = await client.job(await client.model(A, compress="wait"))
        await executor.running.wait()
        queued = [await client.job(await client.model(A, n=str(index))) for index in range(50)]
        small = await client.job(await client.model(B))
        assert small.progress.queue_position == 0
        executor.gate.set()
        for job in (blocking, small, *queued):
            await client.wait(job)
        assert executor.started[:2] == [blocking.name, small.name]


async def test_another_projects_model_is_inspected_next(serve: Serve) -> None:
    """A project with many models that never end to inspect holds the others up by one inspection."""
    async with serve() as running:
        client, executor = running.client, running.executor
        executor.inspection_gate.clear()
        models = [await client.model(A, n=str(index)) for index in range(30)]
        running.server._scheduler.wake()
        await until(lambda: executor.inspecting)
        mine = await client.model(B, n="mine")
        executor.inspection_gate.set()
        running.server._scheduler.wake()

        async def active(model: Any) -> bool:
            request = model_service_pb2.GetModelRequest(name=model.name)
            return bool((await client.models.GetModel(request)).state == model_service_pb2.Model.STATE_ACTIVE)

        await until(lambda: active(mine))
        await until(lambda: active(models[-1]))
        assert [script["n"] for script in executor.inspecting].index("mine") == 1


async def test_priority_holds_within_a_project(serve: Serve) -> None:
    """A project's higher priority comes first in its own queue, and gains nothing on other projects."""
    async with serve() as running:
        client, executor = running.client, running.executor
        await client.job(await client.model(A, compress="wait"))
        await executor.running.wait()
        model = await client.model(A)
        low = await client.job(model, priority=-1)
        plain = await client.job(model, skip_cache=True)
        high = await client.job(model, skip_cache=True, priority=100)
        other = await client.job(await client.model(B), priority=-100)
        executor.gate.set()
        for job in (low, plain, high, other):
            await client.wait(job)
        order = executor.started[1:]
        assert order.index(high.name) < order.index(plain.name) < order.index(low.name)
        assert order.index(other.name) <= 1
        failure = await failing(client.job(model, priority=101))
        assert "job.spec.priority" in failure.message


async def test_running_jobs_of_a_project_are_limited(serve: Serve, tmp_path: Path) -> None:
    """A place stays free for others, while a project has as many running as it may."""
    projects = tmp_path / "projects.toml"
    projects.write_text("[team-a]\nmax_running_jobs = 1\n")
    async with serve(workers=3, projects_file=projects) as running:
        client, executor = running.client, running.executor
        model = await client.model(A, compress="wait")
        first = await client.job(model)
        second = await client.job(model, skip_cache=True)
        others = [await client.job(await client.model(B, compress="wait", n=n)) for n in "12"]
        await until(lambda: len(executor.started) == 3)
        assert set(executor.started) == {first.name, *(job.name for job in others)}
        executor.gate.set()
        await client.wait(second)


async def test_models_of_a_project_are_limited(serve: Serve) -> None:
    """Too many models, or too many that wait for inspection: RESOURCE_EXHAUSTED; other projects go on."""
    async with serve(max_models=3, max_pending_models=2) as running:
        client = running.client
        running.executor.inspection_gate.clear()
        models = [await client.model(A, n=n) for n in "12"]
        failure = await failing(client.model(A, n="3"))
        assert (failure.code, failure.reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "QUOTA_EXCEEDED")
        assert "wait for their inspection" in failure.message
        await client.model(B)
        running.executor.inspection_gate.set()
        await client.wait(await client.job(models[0]))
        await client.wait(await client.job(models[1]))
        await client.model(A, n="3")
        assert "3 models, the most" in (await failing(client.model(A, n="4"))).message


class TestTheProjectsFile:
    def test_it_is_read_again_when_it_changes(self, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
        """New limits hold at once; while the file is wrong, what it said before holds, and the log says so."""
        file = tmp_path / "projects.toml"
        file.write_text("[a]\nweight = 2\nmax_models = 5\n")
        projects = Projects(Settings(projects_file=file, max_queued_jobs=7))
        assert (projects.limits("a").weight, projects.limits("a").max_models) == (2, 5)
        assert (projects.limits("b").weight, projects.limits("b").max_queued_jobs) == (1.0, 7)
        file.write_text("[a]\nweight = 0.25\n")
        assert projects.limits("a").weight == 0.25
        file.write_text("[a]\nweight = 'no'\n")
        assert projects.limits("a").weight == 0.25
        assert "what it said before holds" in caplog.text

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("[a]\nwieght = 1\n", "there is no limit wieght"),
            ("[a]\nweight = 0\n", "more than 0"),
            ("[a]\nmax_models = -1\n", "at least 0"),
            ("[a]\nmax_models = 1.5\n", "at least 0"),
            ("[a]\nmax_models = true\n", "at least 0"),
            ("a = 1\n", "not a table"),
            ("['..']\n", "not a table"),
            ("[a", "cannot read"),
            (None, "cannot read"),
        ],
    )
    def test_a_wrong_one_is_told(self, tmp_path: Path, text: str | None, message: str) -> None:
        """The server does not start, and the error names the place."""
        file = tmp_path / "projects.toml"
        if text is not None:
            file.write_text(text)
        with pytest.raises(SettingsError, match=message):
            Projects(Settings(projects_file=file))
