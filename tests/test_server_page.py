"""The page of a server, in a real browser."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from server_running import adapter_folder, running
from test_report_page import CHROMIUM, FLAGS, HOSTILE

from trimtab.server.app import PAGE


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    if CHROMIUM is None:
        pytest.skip("no chromium on this machine, so the page was not opened in a browser")
    sync_playwright = pytest.importorskip("playwright.sync_api").sync_playwright
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


def test_the_page_names_no_other_place() -> None:
    text = PAGE.read_text("utf-8")
    assert not re.search(r"""(?:src|href|action)=["'](?!data:,)|url\(|@import|https?:|innerHTML""", text)
    assert len(text) < 10_000


@pytest.mark.browser
def test_load_is_shown_and_a_prompt_is_answered_as_it_is_written(chromium: Any, tmp_path: Path) -> None:
    from playwright.sync_api import expect

    expect.set_options(timeout=15_000)
    adapters = adapter_folder(tmp_path / "adapters")
    with running(tmp_path / "run", "--delay", "0.02", "--adapters", str(adapters), key="k") as server:
        address = f"http://127.0.0.1:{server.port}/"
        context = chromium.new_context(
            http_credentials={"username": "any", "password": "k"}, viewport={"width": 420, "height": 900}
        )
        page = context.new_page()
        complaints: list[str] = []
        asked: list[str] = []
        page.on("console", lambda message: complaints.append(message.text))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("request", lambda request: asked.append(request.url))
        page.goto(address)
        at = page.locator
        expect(at("#model option")).to_have_count(3)
        expect(at("#name")).to_have_text("pocket")
        at("#prompt").fill(HOSTILE)
        at("#tokens").fill("60")
        at("#go").click()
        expect(at("#text")).to_contain_text("<script>")
        expect(at("#go")).to_have_text("Stop")
        expect(at("#said")).to_contain_text("60 tokens in")
        expect(at("#text")).to_contain_text(HOSTILE[:30])
        expect(at("#load")).to_contain_text("60tokens written")
        expect(at("#load")).to_contain_text("25 %")
        at("#model").select_option("two")
        at("#tokens").fill("5000")
        at("#go").click()
        expect(at("#text")).to_contain_text("<script>")
        at("#go").click()
        expect(at("#said")).to_have_text("stopped")
        assert server.orders("submit")[-1]["adapter"] == "two" and page.title() == "trimtab serve"
        at("#tokens").fill("100000")
        at("#go").click()
        expect(at("#said")).to_contain_text("more than the context")
        if picture := os.environ.get("TRIMTAB_PICTURE"):
            page.screenshot(path=picture)
        assert not page.evaluate("document.documentElement.scrollWidth > document.documentElement.clientWidth")
        assert all(url.startswith(address) or url.startswith("data:") for url in asked)
        assert [text for text in complaints if "400 (Bad Request)" not in text and "401" not in text] == []
        context.close()
