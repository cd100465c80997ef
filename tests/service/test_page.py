"""The page in a real browser: what a person does with it."""

from __future__ import annotations

import base64
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from safetensors.torch import load_file

from tests.support import graphs
from tests.support.service import upload

playwright = pytest.importorskip("playwright.sync_api")

expect = playwright.expect
expect.set_options(timeout=20_000)
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
pytestmark = [
    pytest.mark.waits,
    pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium"),
]
ARGUMENTS = [
    *("--no-sandbox", "--headless=new", "--disable-gpu", "--disable-background-networking"),
    *("--disable-component-update", "--disable-sync", "--no-first-run"),
]
# Files come from a person's desktop as a DataTransfer.
DROP = """async ([selector, name, content]) => {
    const bytes = Uint8Array.from(atob(content), (c) => c.charCodeAt(0));
    const data = new DataTransfer();
    data.items.add(new File([bytes], name));
    const target = document.querySelector(selector);
    for (const kind of ["dragenter", "dragover", "drop"]) {
        const event = new DragEvent(kind, {dataTransfer: data, bubbles: true, cancelable: true});
        target.dispatchEvent(event);
    }
}"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as started:
        chromium = started.chromium.launch(
            executable_path=CHROMIUM, args=ARGUMENTS, ignore_default_args=["--headless"]
        )
        yield chromium
        chromium.close()


@pytest.fixture
def context(browser: Any, address: str) -> Iterator[Any]:
    """A browser that must not ask anyone else, nor complain."""
    found = browser.new_context(viewport={"width": 1400, "height": 900})
    found.set_default_timeout(20_000)
    complaints: list[str] = []
    found.on("request", lambda request: _note(complaints, request.url, address))
    found.on("weberror", lambda error: complaints.append(str(error.error)))
    yield found
    found.close()
    assert not complaints


def _note(complaints: list[str], url: str, address: str) -> None:
    if not url.startswith((address, "data:", "blob:")):
        complaints.append(url)


def opened(context: Any, address: str, fragment: str = "") -> Any:
    page = context.new_page()
    page.goto(f"{address}/{fragment}")
    page.wait_for_selector("html[data-ready]")
    return page


def drop(page: Any, name: str, content: bytes, target: str = "#drop") -> None:
    page.evaluate(DROP, [target, name, base64.b64encode(content).decode()])


@pytest.fixture
def page(context: Any, address: str, client: httpx.Client, demo: Path) -> Iterator[Any]:
    """The page with the demo network, which was uploaded before."""
    model = upload(client, demo)["id"]
    found = opened(context, address, f"#model={model}")
    found.wait_for_selector("#totals dd")
    yield found
    client.delete(f"/api/v1/models/{model}")


def total(page: Any, name: str) -> str:
    found = page.locator("#totals div", has_text=name).locator("dd").inner_text()
    return str(found)


def test_a_person_drops_slides_prunes_and_downloads(
    context: Any, address: str, demo: Path, tmp_path: Path
) -> None:
    page = opened(context, address)
    drop(page, "digits.safetensors", demo.read_bytes())
    page.wait_for_selector("#totals dd")
    assert "9 convolutions" in page.inner_text("#facts")
    assert page.locator("#layers tbody tr").count() == 9
    before = total(page, "Kept values")
    slider = page.locator("#sparsity")
    slider.focus()
    for _ in range(20):
        page.keyboard.press("ArrowRight")
    expect(page.locator("#amount")).to_have_text("90.0%")
    expect(page.locator("#totals")).not_to_contain_text(before)
    expect(page.locator("#totals div", has_text="Pruned").locator("dd")).to_have_text("90.0%")
    page.get_by_role("radio", name=re.compile("^dct")).check()
    expect(page.locator("#by-sparsity .chosen")).to_have_class(re.compile("c2"))
    assert page.locator("#by-sparsity path").count() == page.locator("#bases input").count() == 6
    page.get_by_role("button", name="layer2.conv1").click()
    expect(page.locator("#kernels")).to_have_attribute("src", re.compile(r"layer2\.conv1"))
    assert page.locator("#kernels").evaluate("image => image.naturalWidth") > 50
    page.get_by_role("button", name="Prune", exact=True).click()
    page.wait_for_selector("#jobs li[data-state=done]")
    with page.expect_download() as downloading:
        page.get_by_role("link", name="Download the model").click()
    assert downloading.value.suggested_filename == "digits-prune-dct-0.9.safetensors"
    downloading.value.save_as(tmp_path / "pruned.safetensors")
    kept = page.inner_text("#jobs li")
    assert total(page, "Kept values") in kept
    assert load_file(tmp_path / "pruned.safetensors").keys() == load_file(demo).keys()


def focused(page: Any) -> str:
    """What has the focus: its id, else its text; and it must be seen that it has."""
    found = page.evaluate(
        """() => {
            const one = document.activeElement;
            const ring = one.closest("label.drop") ?? one;
            const style = getComputedStyle(ring);
            const box = ring.getBoundingClientRect();
            return {
                name: one.id || one.value || one.textContent,
                seen: style.outlineStyle !== "none" && parseFloat(style.outlineWidth) >= 2,
                inside: box.bottom > 0 && box.top < innerHeight && box.width > 0,
            };
        }"""
    )
    assert found["seen"], found
    assert found["inside"], found
    return str(found["name"])


def tab_to(page: Any, name: str, most: int = 40) -> None:
    """Press Tab until something has the focus."""
    passed = []
    for _ in range(most):
        page.keyboard.press("Tab")
        passed.append(focused(page))
        if passed[-1] == name:
            return
    raise AssertionError(f"{name!r} is not among {passed}")


def test_all_of_it_is_done_by_keyboard(
    context: Any, address: str, demo: Path, tmp_path: Path
) -> None:
    page = opened(context, address)
    page.on("filechooser", lambda chooser: chooser.set_files(demo))
    tab_to(page, "file")
    page.keyboard.press("Enter")
    page.wait_for_selector("#totals dd")
    assert focused(page) == "file"
    tab_to(page, "sparsity")
    for _ in range(3):
        page.keyboard.press("ArrowRight")
    expect(page.locator("#amount")).to_have_text("81.5%")
    # One stop for all bases, and arrows between them.
    page.keyboard.press("Tab")
    assert focused(page) == "auto"
    page.keyboard.press("ArrowDown")
    assert focused(page) == "identity"
    for _ in range(2):
        page.keyboard.press("ArrowDown")
    assert focused(page) == "dct"
    expect(page.locator("#by-sparsity .chosen")).to_have_class(re.compile("c2"))
    tab_to(page, "prune")
    page.keyboard.press("Enter")
    page.wait_for_selector("#jobs li[data-state=done]")
    assert focused(page) == "prune"
    tab_to(page, "Download the model")
    with page.expect_download() as downloading:
        page.keyboard.press("Enter")
    assert downloading.value.suggested_filename == "digits-prune-dct-0.815.safetensors"
    tab_to(page, "layer2.conv1")
    page.keyboard.press("Enter")
    expect(page.locator("#kernels")).to_have_attribute("src", re.compile(r"layer2\.conv1"))
    assert focused(page) == "layer2.conv1"
    page.locator("#remove").focus()
    page.keyboard.press("Enter")
    expect(page.locator("#model")).to_be_hidden()
    assert focused(page) == "file"


def test_what_a_job_says_meanwhile_takes_no_focus(page: Any) -> None:
    """Cancel keeps it while the progress beside it is drawn again."""
    page.evaluate(
        """async () => {
            const { jobs } = await import("/static/jobs.js");
            jobs.stop();
            const row = (share) => ({
                id: "a", kind: "prune", state: "running", stage: "prune", share, created: 1,
                settings: { sparsity: 0.5, basis: "dct" },
            });
            let last = null;
            window.EventSource = class { constructor() { last = this; } close() {} };
            window.fetch = async () => new Response(JSON.stringify(row(0)));
            jobs.start({ id: "m", runs: false }, () => ({}));
            await jobs.add({});
            window.say = (share, more) => {
                last.onmessage({ data: JSON.stringify({ ...row(share), ...more }) });
            };
        }"""
    )
    page.locator("#jobs button").focus()
    page.evaluate("say(0.5)")
    assert page.locator("#jobs progress").get_attribute("value") == "0.5"
    assert focused(page) == "Cancel"
    page.evaluate(
        """say(1, {state: "done", result: {
            file: "a", bytes: 1, kept: 1, error: 0, agreement: null, kl: null, output_error: null,
            seconds: 1,
        }})"""
    )
    assert focused(page) == "Download the model"


def test_a_graph_is_calibrated_and_its_results_are_compared(
    context: Any, address: str, tmp_path: Path
) -> None:
    images = np.random.default_rng(0).normal(size=(12, 3, 8, 8)).astype(np.float32)
    np.savez(tmp_path / "inputs.npz", images=images)
    page = opened(context, address)
    drop(page, "net.onnx", graphs.network().SerializeToString())
    page.wait_for_selector("#totals dd")
    page.get_by_role("button", name="Calibrate", exact=True).click()
    expect(page.get_by_role("alert")).to_contain_text("calibrate needs inputs; upload some")
    drop(page, "inputs.npz", (tmp_path / "inputs.npz").read_bytes(), "#drop-inputs")
    expect(page.locator("#inputs-text")).to_have_text("1 file of inputs")
    expect(page.get_by_role("alert")).to_be_hidden()
    page.get_by_role("button", name="Calibrate", exact=True).click()
    row = page.locator("#jobs li").first
    expect(row).to_have_attribute("data-state", "done")
    expect(row).to_contain_text("Calibrate 80.0% in auto")
    expect(row).to_contain_text(re.compile(r"agrees on [\d.]+% of 12 inputs, divergence [\d.e-]+"))
    page.get_by_role("button", name="Prune and compress").click()
    expect(row).to_contain_text("Compress 80.0% in auto")
    expect(row).to_have_attribute("data-state", "done")
    row.get_by_role("button", name="Compare with the original").click()
    expect(row).to_contain_text("Compared with the original: compress 80.0% in auto")
    expect(row).to_contain_text(re.compile(r"agrees on [\d.]+% of 12 inputs"))
    assert row.get_by_role("link").count() == 0


def test_a_job_outlives_a_reload_and_is_in_both_tabs(page: Any, context: Any, address: str) -> None:
    other = opened(context, address, f"#{page.url.partition('#')[2]}")
    page.fill("#megabytes", "0.03")
    page.get_by_role("button", name="Compress", exact=True).click()
    page.reload()
    for tab in (page, other):
        tab.wait_for_selector("#jobs li[data-state=done]")
        assert re.search(r"Compress to 30 kB\s+\S+ kB, ", tab.inner_text("#jobs li"))


def test_a_person_reads_what_went_wrong(page: Any, tmp_path: Path) -> None:
    drop(page, "virus.exe", b"x")
    alert = page.get_by_role("alert")
    alert.get_by_text("“virus.exe” is of no kind that is taken; allowed: .safetensors").wait_for()
    drop(page, "page.safetensors", b"<!doctype html><title>404</title>")
    alert.get_by_text("was refused: source.safetensors").wait_for()
    assert "a web page" in alert.inner_text()
    page.get_by_role("button", name="Dismiss").click()
    assert not alert.is_visible()
    page.fill("#megabytes", "0.001")
    page.get_by_role("button", name="Compress", exact=True).click()
    page.wait_for_selector("#jobs li[data-state=failed]")
    assert "no step brings the file to 1,000 bytes" in page.inner_text("#jobs li")


def test_a_refused_model_of_another_page_is_removed(
    context: Any, address: str, client: httpx.Client, tmp_path: Path
) -> None:
    (tmp_path / "other.safetensors").write_text("<!doctype html><title>404</title>")
    model = upload(client, tmp_path / "other.safetensors")["id"]
    page = opened(context, address)
    page.get_by_role("button", name="Remove other.safetensors").click()
    expect(page.locator("#models")).not_to_contain_text("other.safetensors")
    assert client.get(f"/api/v1/models/{model}").status_code == 404


def test_a_token_is_asked_for_where_one_is_needed(context: Any, address: str) -> None:
    page = context.new_page()
    asked = []

    def refuse(route: Any) -> None:
        asked.append(route.request.url)
        if len(asked) > 1:
            route.continue_()
        else:
            route.fulfill(status=401, json={"detail": "a token is needed"})

    page.route("**/api/v1/about", refuse)
    page.goto(address)
    page.fill("#login input[type=password]", "a token of a service")
    page.keyboard.press("Enter")
    page.wait_for_selector("html[data-ready]")
    assert not page.locator("#login").is_visible()


def test_it_fits_a_phone_in_light_and_dark(page: Any) -> None:
    page.set_viewport_size({"width": 390, "height": 800})
    colors = {"light": "rgb(255, 255, 255)", "dark": "rgb(21, 24, 28)"}
    for mode, color in colors.items():
        page.emulate_media(color_scheme=mode)
        assert page.evaluate("document.documentElement.scrollWidth") == 390
        assert page.evaluate("getComputedStyle(document.body).backgroundColor") == color
