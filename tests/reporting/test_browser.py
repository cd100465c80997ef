"""The page in a browser: sorting, filtering, enlarging, light and dark, wide and narrow."""

from __future__ import annotations

import csv
import shutil
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from wavprune.sweep.store import Store

api = pytest.importorskip("playwright.sync_api", reason="needs playwright to drive a browser")
NAMES = ("chromium", "chromium-browser", "google-chrome")
CHROMIUM = next(filter(None, map(shutil.which, NAMES)), None)
OPTIONS = (
    "--no-sandbox",
    "--headless=new",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
)

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs a chromium")


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=list(OPTIONS))
        yield browser
        browser.close()


def opened(browser: Any, results: Path, width: int = 1400, scheme: str = "light") -> Any:
    """The page in a window, which complains of every message of the console."""
    context = browser.new_context(
        viewport={"width": width, "height": 900}, color_scheme=scheme, accept_downloads=True
    )
    window = context.new_page()
    window.on("console", lambda message: pytest.fail(message.text))
    window.on("pageerror", lambda error: pytest.fail(str(error)))
    window.goto(results.with_name("page.html").as_uri())
    return window


def texts(window: Any, column: str) -> list[str]:
    """A column of the visible runs."""
    headings = window.locator("#runs thead button").all_inner_texts()
    cell = f"#runs tbody tr:not([hidden]) td:nth-child({headings.index(column) + 1})"
    found: list[str] = window.locator(cell).all_inner_texts()
    return found


@pytest.mark.usefixtures("page")
def test_headings_sort_and_words_filter(browser: Any, results: Path, tmp_path: Path) -> None:
    window = opened(browser, results)
    with Store(results) as store:
        runs = store.runs()
    finished = runs[runs["status"] == "ok"]
    button = window.locator("#runs thead button", has_text="top-1")
    shares = sorted(finished["top1"])
    for order, direction in ((shares, "ascending"), (shares[::-1], "descending")):
        button.click()
        assert texts(window, "top-1") == [f"{share:.1%}" for share in order]
        assert button.locator("..").get_attribute("aria-sort") == direction
    # By number, with nothing at the end; by text.
    window.locator("#runs thead button", has_text="seed").click()
    assert texts(window, "seed")[:4] == ["0", "0", "1", "1"]
    assert set(texts(window, "seed")[4:]) == {""}
    window.locator("#runs thead button", has_text="method").click()
    assert texts(window, "method") == sorted(texts(window, "method"))
    # A heading is where its numbers are.
    cell = window.locator("#runs tbody tr").first.locator("td.number").first
    heading = window.locator("#runs thead th.number").first
    assert cell.evaluate("e => getComputedStyle(e).textAlign") == "right"
    assert heading.evaluate("e => getComputedStyle(e).textAlign") == "right"

    window.fill("#filter", "UHAAR 90.0%")
    assert texts(window, "method") == ["uhaar"] * 2
    assert texts(window, "sparsity") == ["90.0%"] * 2
    assert window.locator("#matches").inner_text() == f"2 of {len(finished)} runs"
    window.fill("#filter", "nothing-like-it")
    assert texts(window, "method") == []
    window.fill("#filter", "")
    assert len(texts(window, "method")) == len(finished)

    with window.expect_download() as download:
        window.get_by_text("All runs as CSV").click()
    download.value.save_as(tmp_path / "runs.csv")
    with (tmp_path / "runs.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["guid"] for row in rows] == finished["guid"].tolist()
    assert [float(row["top1"]) for row in rows] == finished["top1"].tolist()


@pytest.mark.usefixtures("page")
def test_a_picture_is_enlarged_and_put_away(browser: Any, results: Path) -> None:
    window = opened(browser, results, 390)
    assert window.evaluate("document.documentElement.scrollWidth") == 390
    first = window.locator("button.enlarge").first
    shown = first.locator("img")
    narrow = window.locator("source").first.get_attribute("srcset")
    assert shown.evaluate("e => e.currentSrc") == narrow
    first.click()
    large = window.locator("dialog img")
    assert window.locator("dialog").evaluate("e => e.open")
    assert large.get_attribute("src") == shown.get_attribute("src") != narrow
    assert large.bounding_box()["width"] > 2 * shown.bounding_box()["width"]
    window.keyboard.press("Escape")
    assert not window.locator("dialog").evaluate("e => e.open")
    last = window.locator("button.enlarge").last
    last.focus()
    window.keyboard.press("Enter")
    assert large.get_attribute("alt") == last.locator("img").get_attribute("alt")
    window.get_by_role("button", name="Close").click()
    assert not window.locator("dialog").evaluate("e => e.open")


@pytest.mark.usefixtures("page")
def test_pictures_are_dark_on_a_dark_page(browser: Any, results: Path) -> None:
    shades = {}
    for scheme in ("light", "dark"):
        window = opened(browser, results, 1400, scheme)
        back = window.evaluate("getComputedStyle(document.body).backgroundColor")
        shades[scheme] = (back, _shade(window))
    assert shades["light"][0] == "rgb(255, 255, 255)"
    assert shades["dark"][0] == "rgb(21, 24, 28)"
    # What is behind the lines of the first picture is the page.
    assert shades["light"][1] > 200 > 100 > shades["dark"][1]


def _shade(window: Any) -> float:
    """The mean brightness of the first picture on the screen."""
    taken = window.locator("figure img").first.screenshot()
    return float(np.asarray(Image.open(BytesIO(taken)).convert("L")).mean())
