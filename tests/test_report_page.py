"""The HTML report, as text and in a real browser."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from trimtab.report.page import page, write_page

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"]
FLAGS += ["--disable-component-update", "--disable-sync"]
HOSTILE = """<script>document.title = "owned"</script>"><img src=x onerror="document.title='owned'">"""


def a_report(**changes: Any) -> dict[str, Any]:
    """A report with every key of `fit --json`."""

    def point(size: int, value: float, kept: float, **more: Any) -> dict[str, Any]:
        return {
            **{"bytes": size, "metric": "perplexity", "value": value, "low": value - 0.4, "high": value + 0.4},
            **{"retained": kept},
            **more,
        }

    front = [
        point(1_400_000 + 300_000 * i, 24.0 - i, 0.75 + 0.04 * i, name=f"front {i}", plan=f"gptq @ {i + 2}b/g64")
        for i in range(5)
    ]
    sites = [
        {
            **{"path": f"layers.{block}.{role}", "role": role, "block": block, "method": "gptq", "level": "3b/g64"},
            **{"bytes": 27_648, "bits": 3.375, "damage": 0.004, "weights": 65_536, "shape": [256, 256]},
        }
        for block in range(3)
        for role in ("q", "k", "down")
    ]
    sites.append({"path": "embed", "role": "embed", "block": None, "method": "rtn", "level": "8b/row"})
    sites[-1] |= {"bytes": 66_560, "weights": 65_536}
    sites[4] |= {"level": "drop", "bytes": 0, "bits": 0.0}
    whole = {
        **{"model": "pocket", "budget": {"size": 2_200_000, "quality": 0.9, "latency": 0.015, "memory": None}},
        **{"original": point(7_830_000, 18.1, 1.0), "best": point(2_190_000, 18.7, 0.967)},
        **{"uniform": point(2_180_000, 19.9, 0.909), "front": front, "verdict": "Fits, and beats the uniform plan."},
        **{"artifact": "runs/pocket/artifact", "plan": "awq @ 4b/g64 | gptq @ 3b/g64", "seconds": 213.4},
        **{"peak_bytes": 1_230_000_000, "sites": sites, "machine": {"cpu": "a cpu", "cores": 2, "ram": 8_000_000_000}},
        **{"versions": {"torch": "2.13.0"}, "data": {"held-out": {"sha256": "60303ae2"}}},
        "compiled": point(2_190_000, 18.8, 0.962, to_exact=[0.02, 0.15], engine="vnni kernels", reason=None),
        **{"timings": {"probe": 101.0, "apply": 38.2}},
        "healing": {
            **{"steps": 100, "sites": 9, "trained": 12_345, "loss": [0.31, 0.22], "damage": [0.052, 0.041]},
            **{"kept": True, "reason": None, "before": point(2_190_000, 19.3, 0.938, healed=[-0.8, -0.4])},
        },
    }
    return {key: value for key, value in (whole | changes).items() if value is not ...}


class Balance(HTMLParser):
    """Fails on an element that is never closed, or closed out of turn."""

    VOID = frozenset({"meta", "link", "img", "br", "hr", "input"})

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """A self-closing shape of a drawing opens nothing."""

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def balanced(text: str) -> bool:
    parser = Balance()
    parser.feed(text)
    return parser.open == []


def test_the_file_holds_the_numbers_and_names_no_other(tmp_path: Path) -> None:
    text = write_page(a_report(), tmp_path / "deep" / "report.html").read_text("utf-8").replace("\u202f", " ")
    for shown in ("2.19 MB", "18.7", "18.3 to 19.1", "96.7 %", "28.0 %", "+5.80", "3 min 33 s", "1.23 GB", "15 ms"):
        assert shown in text
    assert "awq @ 4b/g64\n| gptq @ 3b/g64" in text
    assert not re.search(r"""(?:src|href|action)=["'](?!data:,)|url\(|@import|https?:""", text)
    assert balanced(text)


OPTIONAL = sorted(set(a_report()) - {"model"})


@pytest.mark.parametrize("key", OPTIONAL)
def test_a_missing_or_empty_key_leaves_its_part_out(key: str) -> None:
    for value in (..., None, {}, [], ""):
        text = page(a_report(**{key: value}))
        assert balanced(text) and "pocket" in text and "None" not in text


def test_the_compiled_program_stands_beside_exact_arithmetic() -> None:
    text = page(a_report())
    assert "The same in the compiled program" in text and "+0.02 to +0.15 beside exact arithmetic" in text
    text = page(a_report(compiled={"reason": "no program runs this model here: it has <b>"}))
    assert "The same in" not in text and "it has &lt;b&gt;." in text and balanced(text)


def test_healing_stands_with_the_point_before_it_or_with_why_there_was_none() -> None:
    text = page(a_report())
    assert "The same before healing" in text and "19.3" in text and "93.8" in text
    assert "Healed in 100 steps: 12,345 stored numbers of 9 sites" in text and "0.31 to 0.22" in text
    assert "damage on the search data from 0.052 to 0.041" in text and "changed by -0.8 to -0.4, 95 % paired" in text
    whole = a_report()["healing"]
    text = page(a_report(healing=whole | {"kept": False, "before": None}))
    assert "before healing" not in text and "left out, as the damage did not fall" in text and balanced(text)
    text = page(
        a_report(healing={"steps": 5, "sites": 0, "kept": False, "reason": "no weight <b> can", "before": None})
    )
    assert "Nothing was healed: no weight &lt;b&gt; can." in text and "Healed" not in text and balanced(text)
    assert "ealed" not in page(a_report(healing=None))


def test_an_empty_report_is_a_page() -> None:
    assert balanced(page({}))


def test_numbers_that_are_none_or_not_finite_are_dashes() -> None:
    broken = {"bytes": 2_000_000, "metric": "perplexity", "value": float("nan"), "low": None, "high": float("inf")}
    text = page(a_report(best=broken, front=[broken, *a_report()["front"]], sites=[{"path": "a"}]))
    assert balanced(text) and "nan" not in text and ">inf" not in text and "–" in text


def test_one_direction_for_every_metric() -> None:
    """Better is upwards: perplexity falls as the page rises, accuracy rises with it."""

    def heights(text: str) -> list[float]:
        return [float(y) for y in re.findall(r'class="point front" x="[^"]*" y="([^"]*)"', text)]

    falling = heights(page(a_report()))
    accuracies = [p | {"metric": "accuracy", "value": p["retained"], "low": None} for p in a_report()["front"]]
    original = {"bytes": 7_830_000, "metric": "accuracy", "value": 1.0, "retained": 1.0}
    report = a_report(front=accuracies, original=original, best=..., uniform=...)
    rising = heights(page(report))
    assert falling == sorted(falling, reverse=True) and rising == sorted(rising, reverse=True) and len(rising) == 5
    assert "higher is better" in page(report) and "lower is better" in page(a_report())


def test_two_splits_are_not_one_chart() -> None:
    """The front is measured on the search data, the verdict on the test data; only the front's own points are drawn."""
    report = a_report(plan="gptq @ 4b/g64")
    for name in ("original", "best", "uniform"):
        report[name]["split"] = "test"
    report["front"] = [p | {"split": "search"} for p in report["front"]]
    report["front"] += [report["front"][0] | {"name": "uniform gptq@2b/g64", "family": "uniform", "plan": "other"}]
    report["front"] += [report["original"] | {"name": "original", "split": "search"}]
    text = page(report)
    kinds = re.findall(r'class="point (\w+)"', text)
    assert sorted(kinds) == ["best", *["front"] * 4, "original", "uniform"]
    assert "on the search data" in text and 'id="chosen-name">front 2<' in text
    assert "data that the search never saw" in text


def test_intervals_are_those_of_the_paired_difference_where_there_are_any() -> None:
    front = [p | {"difference": [0.1, 0.3], "split": "search"} for p in a_report()["front"]]
    front.append(a_report()["original"] | {"name": "original", "difference": [0.0, 0.0], "split": "search"})
    best = a_report()["best"] | {"difference": [0.5, 0.7], "split": "test"}
    text = page(a_report(front=front, best=best, uniform=...))
    assert "of the paired difference from the original" in text and "+0.5 to +0.7" in text
    assert "perplexity 24 (18.2 to 18.4)" in text, "the original's 18.1 and the difference"
    assert "paired difference" not in page(a_report())


def test_hostile_text_is_text_everywhere() -> None:
    report = a_report(
        **dict.fromkeys(("model", "verdict", "plan", "artifact"), HOSTILE),
        budget=HOSTILE,
        machine={HOSTILE: HOSTILE},
        timings={HOSTILE: 1.0},
        front=[p | {"name": HOSTILE, "plan": HOSTILE, "metric": HOSTILE} for p in a_report()["front"]],
        sites=[
            s | {"path": HOSTILE, "role": HOSTILE, "method": HOSTILE, "shape": HOSTILE} for s in a_report()["sites"]
        ],
    )
    text = page(report)
    assert text.count("<script") == 1 and "<img" not in text and "&lt;script&gt;" in text


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    if CHROMIUM is None:
        pytest.skip("no chromium on this machine, so the report was not opened in a browser")
    sync_playwright = pytest.importorskip("playwright.sync_api").sync_playwright
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


class Opened:
    """A page in the browser, with all that it complained of and all that it asked the network for."""

    def __init__(self, browser: Any, file: Path, **options: Any) -> None:
        self.complaints: list[str] = []
        self.requests: list[str] = []
        self.page = browser.new_context(**options).new_page()
        self.page.on("console", lambda message: self.complaints.append(message.text))
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.goto(file.as_uri())

    def quiet(self) -> bool:
        return not self.complaints and [u for u in self.requests if not u.startswith("data:")] == [self.page.url]


@pytest.mark.browser
def test_points_are_drawn_hover_shows_numbers_and_click_shows_the_plan(chromium: Any, tmp_path: Path) -> None:
    opened = Opened(chromium, write_page(a_report(), tmp_path / "r.html"), viewport={"width": 1100, "height": 800})
    view, tip = opened.page, opened.page.locator("#tip")
    assert view.locator(".point").count() == 8
    plot = view.locator("#front").bounding_box()
    centres = []
    for point in view.locator(".point.front").all():
        box = point.bounding_box()
        centres.append((box["x"] + box["width"] / 2, box["y"] + box["height"] / 2))
        assert plot["x"] <= centres[-1][0] <= plot["x"] + plot["width"]
        assert plot["y"] <= centres[-1][1] <= plot["y"] + plot["height"]
    assert len(centres) == 5 and centres == sorted(centres)
    assert tip.is_hidden()
    third = view.locator(".point.front").nth(2)
    third.hover()
    assert tip.is_visible()
    assert "front 2" in tip.inner_text() and "perplexity 22 (21.6 to 22.4)" in tip.inner_text()
    third.click()
    assert view.locator("#chosen-plan").inner_text() == "gptq @ 4b/g64"
    assert view.locator('.point[aria-pressed="true"]').get_attribute("data-name") == "front 2"
    assert opened.quiet()


@pytest.mark.browser
def test_the_chart_and_the_map_answer_to_the_keyboard(chromium: Any, tmp_path: Path) -> None:
    opened = Opened(chromium, write_page(a_report(), tmp_path / "r.html"))
    view, tip = opened.page, opened.page.locator("#tip")
    view.keyboard.press("Tab")
    while view.evaluate("document.activeElement.dataset.name") != "front 1":
        assert view.evaluate("document.activeElement !== document.body"), "Tab never came to the point"
        view.keyboard.press("Tab")
    assert tip.is_visible()
    view.keyboard.press("Enter")
    assert view.locator("#chosen-plan").inner_text() == "gptq @ 3b/g64"
    view.keyboard.press("Escape")
    assert tip.is_hidden()
    view.locator('.cell.site[tabindex="0"]').focus()
    walked = [view.evaluate("document.activeElement.dataset.name")]
    for key in ("ArrowRight", "ArrowDown", "ArrowRight", "ArrowUp"):
        view.keyboard.press(key)
        walked.append(view.evaluate("document.activeElement.dataset.name"))
    assert walked == ["layers.0.q", "layers.0.k", "layers.1.k", "layers.1.down", "layers.0.down"]
    assert "gptq@3b/g64" in tip.inner_text() and "damage 0.004" in tip.inner_text()
    assert opened.quiet()


@pytest.mark.browser
def test_the_map_has_a_cell_for_each_site(chromium: Any, tmp_path: Path) -> None:
    report = a_report()
    opened = Opened(chromium, write_page(report, tmp_path / "r.html"))
    cells = opened.page.locator(".cell.site")
    assert cells.count() == len(report["sites"])
    assert opened.page.locator("#heat tbody tr").count() == 4
    colours = {cell.evaluate("e => getComputedStyle(e).backgroundColor") for cell in cells.all()}
    assert len(colours) == 3
    assert opened.page.locator("#timings tr").count() == 2


@pytest.mark.browser
def test_it_fits_a_phone_and_has_a_dark_side(chromium: Any, tmp_path: Path) -> None:
    file = write_page(a_report(), tmp_path / "r.html")
    paper = "getComputedStyle(document.body).backgroundColor"
    phone = Opened(chromium, file, viewport={"width": 360, "height": 740}, is_mobile=True, has_touch=True)
    assert phone.page.evaluate("document.documentElement.scrollWidth") <= 360
    phone.page.locator(".point.uniform").tap()
    assert phone.page.locator("#chosen-name").inner_text() == "best uniform plan"
    dark = Opened(chromium, file, color_scheme="dark")
    assert phone.page.evaluate(paper) != dark.page.evaluate(paper)
    assert phone.quiet() and dark.quiet()


@pytest.mark.browser
def test_hostile_names_stay_text_in_the_browser(chromium: Any, tmp_path: Path) -> None:
    front = [p | {"name": HOSTILE, "plan": HOSTILE} for p in a_report()["front"]]
    opened = Opened(chromium, write_page(a_report(model=HOSTILE, front=front), tmp_path / "r.html"))
    point = opened.page.locator(".point.front").first
    point.hover()
    point.click()
    assert opened.page.locator("#chosen-plan").inner_text() == HOSTILE
    assert opened.page.locator("h1").inner_text() == HOSTILE
    assert opened.page.title() != "owned" and opened.page.locator("img").count() == 0
    assert opened.quiet()
