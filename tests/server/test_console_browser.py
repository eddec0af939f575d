"""The console in Chromium, at the widths of a desk and of a phone. Needs Playwright and a Chromium: else skipped."""

from __future__ import annotations

import shutil
from collections.abc import AsyncIterator
from typing import Any

import pytest
from server_harness import Running, Serve

pytestmark = pytest.mark.slow
playwright = pytest.importorskip("playwright.async_api", reason="pip install 'modelpress[browser]'")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
if CHROMIUM is None:
    pytest.skip("no chromium on the PATH: apt-get install chromium", allow_module_level=True)

CONSOLE = {"http_listen": "127.0.0.1:0", "console": True}
WIDTHS = {"desk": {"width": 1280, "height": 800}, "phone": {"width": 390, "height": 844}}
FAULTS = ("error", "warning")
HOSTILE = "<script>window.stolen = 1</script><img src=x onerror='window.stolen = 1'>" + "x" * 150
CANDIDATES = {
    "candidates": [
        {
            "name": f"prune {index * 10} %, quantize static, memory-bound layers and sums too",
            "size_bytes": 30_000 - 1000 * index,
            "speedup": {"median": 1 + index / 10, "low": 0.9 + index / 10, "high": 1.2 + index / 10},
            "agreement": 0.99,
            "chosen": index == 3,
            "pareto": index % 2 == 0,
            "reason": "another is better in size and time together",
        }
        for index in range(8)
    ]
}


@pytest.fixture
async def chromium() -> AsyncIterator[Any]:
    async with playwright.async_playwright() as tool:
        browser = await tool.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        await browser.close()


async def opened(browser: Any, width: str = "desk", **options: Any) -> tuple[Any, list[str]]:
    """A page, and what it complains of: errors of scripts, and whatever its policy forbade."""
    page = await (await browser.new_context(viewport=WIDTHS[width], **options)).new_page()
    complaints: list[str] = []
    page.on("console", lambda message: complaints.append(message.text) if message.type in FAULTS else None)
    page.on("pageerror", lambda error: complaints.append(str(error)))
    return page, complaints


def address(running: Running) -> str:
    return f"http://{running.server.http_address}/console"


@pytest.mark.parametrize("width", WIDTHS)
async def test_every_page_fits(serve: Serve, chromium: Any, width: str) -> None:
    """Nothing sticks out to the side, nothing lies over anything that can be clicked, and nothing is complained of."""
    async with serve(**CONSOLE) as running:
        running.executor.report_json = CANDIDATES
        model = await running.client.model()
        jobs = [
            await running.client.wait(await running.client.job(model, labels={"a": HOSTILE}, skip_cache=True))
            for _ in range(2)
        ]
        await running.client.wait(await running.client.job(await running.client.model(compress="fail")))
        await running.client.job(await running.client.model(compress="wait"))
        await running.executor.running.wait()
        page, complaints = await opened(chromium, width)
        query = "&".join(f"job={job.name}" for job in jobs)
        for path in (
            "",
            "/queue",
            "/projects/default",
            f"/{jobs[0].name}",
            f"/compare?{query}",
            "/compare",
            "/sign-in",
        ):
            answer = await page.goto(address(running) + path)
            assert answer.status == 200
            sticks_out = await page.evaluate(
                "document.documentElement.scrollWidth - document.documentElement.clientWidth"
            )
            assert sticks_out == 0, path
            covered = await page.evaluate(
                """[...document.querySelectorAll("a, button, input:not([type=hidden])")].filter((element) => {
                  element.scrollIntoView({block: "center"});
                  const box = element.getBoundingClientRect();
                  const top = document.elementFromPoint(box.x + box.width / 2, box.y + box.height / 2);
                  return box.width === 0 || !(element.contains(top) || top?.contains(element));
                }).map((element) => element.outerHTML)"""
            )
            assert covered == [], path
            assert await page.evaluate("window.stolen") is None
        assert await page.goto(f"{address(running)}/{jobs[0].name}")
        assert await page.locator("svg circle").count() == 8
        assert complaints == []
        running.executor.gate.set()


async def test_progress_comes_to_an_open_page(serve: Serve, chromium: Any) -> None:
    """Stage and share change without loading, and the page of a job that ends shows its end by itself."""
    async with serve(**CONSOLE) as running:
        model = await running.client.model(compress="wait")
        first = await running.client.job(model)
        await running.executor.running.wait()
        second = await running.client.job(model, skip_cache=True)
        page, complaints = await opened(chromium)
        await page.goto(f"{address(running)}/{second.name}")
        await playwright.expect(page.locator("[data-show=stage]")).to_have_text("the next one")
        await page.goto(f"{address(running)}/{first.name}")
        await playwright.expect(page.locator("[data-show=percent]")).to_have_text("50 %")
        running.executor.gate.set()
        await playwright.expect(page.locator("h1 .badge")).to_have_text("succeeded")
        await playwright.expect(page.locator("[data-live]")).to_have_count(0)
        assert complaints == []


async def test_signing_in_and_out_without_scripts(serve: Serve, chromium: Any) -> None:
    """Signing in leads to what was asked for, and signing out ends it, by forms alone."""
    async with serve(token="a-token", **CONSOLE) as running:
        page, _ = await opened(chromium, java_script_enabled=False)
        await page.goto(f"{address(running)}/projects/default")
        await page.get_by_label("Token").fill("a-token")
        await page.get_by_role("button", name="Sign in").click()
        await playwright.expect(page.locator("h1")).to_have_text("default")
        await page.get_by_role("button", name="Sign out").click()
        await playwright.expect(page.locator("h1")).to_have_text("Sign in")


async def test_two_jobs_are_chosen_and_compared(serve: Serve, chromium: Any) -> None:
    """Two boxes and a button, without scripts."""
    async with serve(**CONSOLE) as running:
        model = await running.client.model()
        for priority in (1, 2):
            await running.client.wait(await running.client.job(model, priority=priority, skip_cache=True))
        await running.client.job(await running.client.model(compress="wait"))
        await running.executor.running.wait()
        page, _ = await opened(chromium, java_script_enabled=False)
        await page.goto(f"{address(running)}/projects/default?state=SUCCEEDED")
        for box in await page.get_by_role("checkbox").all():
            await box.check()
        await page.get_by_role("button", name="Compare").click()
        await playwright.expect(page.locator("tr.differs", has_text="Priority")).to_contain_text("2")
        await page.goto(f"{address(running)}/queue")
        await page.locator("td.name a").click()
        await playwright.expect(page.locator("h1 .badge")).to_have_text("running")
        assert await page.locator("meta[http-equiv=refresh]").get_attribute("content") == "5"
        running.executor.gate.set()


async def test_a_report_runs_nothing(serve: Serve, chromium: Any) -> None:
    """Even a report that a hostile model had a worker write has no scripts and no part in the console's origin."""
    async with serve(**CONSOLE) as running:
        running.executor.report = (
            "<!doctype html><title>kept</title><style>p { color: rgb(1, 2, 3) }</style><p>figures</p>"
            "<script>document.title = 'changed'</script><img src=x onerror=\"document.title = 'changed'\">"
            "<iframe src='/console'></iframe>"
        )
        job = await running.client.wait(await running.client.job(await running.client.model()))
        page, _ = await opened(chromium)
        await page.goto(f"{address(running)}/{job.name}/report")
        assert await page.title() == "kept"
        assert await page.evaluate("self.origin") == "null"
        assert await page.evaluate("getComputedStyle(document.querySelector('p')).color") == "rgb(1, 2, 3)"
