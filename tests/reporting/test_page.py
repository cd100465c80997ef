from __future__ import annotations

import base64
import html
import re
import sqlite3
import xml.etree.ElementTree as ET
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from tests.reporting.conftest import HOSTILE
from wavprune.reporting import summary
from wavprune.reporting.page import write_page
from wavprune.reporting.scale import with_metric
from wavprune.sweep.store import Store

FIRST_FORMAT = Path(__file__).parents[1] / "sweep" / "data" / "results-format-1.sql"
VOID = {"meta", "img", "br", "link", "input", "source"}

pytestmark = pytest.mark.filterwarnings("ignore::wavprune.LevelCollapsedWarning")


@pytest.fixture(scope="module")
def tables(results: Path) -> tuple[pd.DataFrame, pd.DataFrame]:
    with Store(results) as store:
        runs = store.runs()
        return runs[runs["status"] == "ok"], store.layers()


class Document(HTMLParser):
    """What a browser sees: elements, their attributes and texts."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[tuple[str, str]] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append((self.open[-1] if self.open else "", data))

    def attributes(self, tag: str) -> list[dict[str, str | None]]:
        return [found for name, found in self.elements if name == tag]


def test_the_page_is_whole_and_every_tag_is_closed(page: str) -> None:
    document = Document(page)
    assert document.open == []
    names = Counter(name for name, _ in document.elements)
    assert names["html"] == names["h1"] == names["main"] == names["script"] == 1
    ids = [found["id"] for _, found in document.elements if "id" in found]
    assert len(ids) == len(set(ids))
    targets = {found["href"] for found in document.attributes("a") if "download" not in found}
    assert targets <= {f"#{name}" for name in ids}


def test_the_page_asks_for_nothing_from_elsewhere(page: str) -> None:
    document = Document(page)
    for _, found in document.elements:
        for name in ("src", "href", "action", "data", "srcset"):
            assert (found.get(name) or "#").startswith(
                ("data:image/svg+xml;base64,", "data:text/csv;charset=utf-8;base64,", "#")
            )
    assert not re.search(r"https?://|url\(|@import", page)
    policy = next(f for f in document.attributes("meta") if f.get("http-equiv"))
    assert (policy["content"] or "").startswith("default-src 'none'")


def test_pictures_are_whole_and_described(page: str) -> None:
    document = Document(page)
    *images, enlarged = document.attributes("img")
    assert enlarged == {"alt": ""}
    assert len(images) == 7
    # Two of them are drawn for a phone too.
    narrow = [found["srcset"] for found in document.attributes("source")]
    assert len(narrow) == 2
    assert all(len(image["alt"] or "") > 20 for image in images)
    widths = []
    for source in [*(image["src"] for image in images), *narrow]:
        svg = ET.fromstring(base64.b64decode((source or "").partition(",")[2]))
        assert svg.tag.endswith("svg")
        text = ET.tostring(svg, encoding="unicode")
        assert 'href="http' not in text
        assert "prefers-color-scheme: dark" in text
        # No ink of its own.
        assert "fill: #262626" not in text
        widths.append(float(svg.attrib["width"].removesuffix("pt")))
    assert max(widths[-2:]) < 0.6 * max(widths)


def test_names_are_shown_and_not_obeyed(page: str) -> None:
    assert HOSTILE not in page
    assert html.escape(HOSTILE, quote=False).replace('"', "&#34;") in page
    assert any(tag == "h2" and HOSTILE in text for tag, text in Document(page).texts)


def test_every_run_is_in_the_table_with_its_figures(
    page: str, tables: tuple[pd.DataFrame, pd.DataFrame]
) -> None:
    runs, _ = tables
    for row in runs.to_dict("records"):
        line = next(each for each in page.splitlines() if f">{row['guid'][:8]}</td>" in each)
        assert f'data-key="{row["top1"]}"' in line
        assert f'data-key="{row["stored_bytes"]:.1f}"' in line
        assert row["guid"] in page


def test_every_heading_has_a_scope_and_those_of_runs_can_be_pressed(page: str) -> None:
    document = Document(page)
    assert all(found.get("scope") in ("col", "row") for found in document.attributes("th"))
    pressed = [text for tag, text in document.texts if tag == "button"]
    assert {"run", "method", "sparsity", "top-1", "size", "layer", "threshold"} <= set(pressed)


def test_failed_runs_are_there_with_their_errors(results: Path, page: str) -> None:
    with Store(results) as store:
        runs = store.runs()
    failed = runs[runs["status"] == "failed"]
    assert len(failed) == 2
    for row in failed.to_dict("records"):
        assert (
            html.escape(row["error"]).replace("&#x27;", "&#39;").replace("&quot;", "&#34;") in page
        )
    assert "Traceback (most recent call last)" in page


def test_settings_and_versions_are_exact(page: str) -> None:
    texts = [text.strip() for _, text in Document(page).texts]
    assert texts[texts.index("batch_size") + 1] == "256"
    assert any(
        "config.sparsity=0.9" in text and 'config.wavelet="bior4.4"' in text for text in texts
    )
    assert any(re.search(r"wavprune \S+, torch \S+", text) for text in texts)


def test_the_words_say_what_the_runs_say(
    page: str, tables: tuple[pd.DataFrame, pd.DataFrame]
) -> None:
    runs, layers = tables
    (network,) = networks(runs)
    assert network.models == (HOSTILE, "demo-1")
    (panel_summary,) = summary.panel_summaries(network)
    assert panel_summary.sparsities == (0.5, 0.9)
    for label, method, wavelet in (
        ("uhaar", "dwt", "uhaar"),
        ("bior4.4", "dwt", "bior4.4"),
        ("min-weight", "min_weight", None),
        ("random", "random", None),
    ):
        of = runs[(runs["method"] == method) & (runs["sparsity_requested"] == 0.9)]
        of = of[of["wavelet"] == wavelet] if wavelet else of
        cell = panel_summary.rows[label][1]
        assert cell["y"] == pytest.approx(of["top1"].mean())
        assert (cell["low"], cell["high"]) == (of["top1"].min(), of["top1"].max())
        assert cell["runs"] == len(of)
    assert panel_summary.rows["random"][0] == {}
    texts = {text for _, text in Document(page).texts}
    assert set(panel_summary.sentences) <= texts
    assert len(panel_summary.sentences) == 3
    assert summary.collapsed(runs, layers)[0] in texts
    assert "bior4.4" in summary.collapsed(runs, layers)[0]
    assert "uhaar" not in summary.collapsed(runs, layers)[0]


def networks(runs: pd.DataFrame, tolerance: float | None = None) -> list[summary.Network]:
    runs = with_metric(runs)
    if "bytes" not in runs:
        runs["bytes"] = 1000 * (1.1 - runs["sparsity"])
    return summary.networks(runs, tolerance)


def panel(**accuracies: list[float]) -> pd.DataFrame:
    """Runs at 50, 80 and 90% of a network that is right in 98% of the samples unpruned."""
    rows: list[dict[str, Any]] = [{"method": "none", "sparsity": 0.0, "top1": 0.98}]
    for label, values in accuracies.items():
        method = {"method": label} if label.startswith(("min", "ran")) else {"wavelet": label}
        rows += [
            {"method": "dwt", "sparsity": at, "sparsity_requested": at, "top1": top1, **method}
            for at, top1 in zip((0.5, 0.8, 0.9), values, strict=True)
        ]
    frame = pd.DataFrame(
        rows, columns=["method", "wavelet", "sparsity", "sparsity_requested", "top1"]
    )
    frame = frame.assign(model="net", data="images", parameters=10, settings="{}", scope="global")
    return frame.assign(guid=[f"run{i}" for i in range(len(frame))])


def test_sentences_on_what_holds_and_what_leads() -> None:
    runs = panel(uhaar=[0.98, 0.975, 0.96], dct=[0.98, 0.96, 0.975], min_weight=[0.98, 0.94, 0.6])
    (network,) = networks(runs)
    (panel_summary,) = summary.panel_summaries(network)
    assert panel_summary.sentences == (
        "Within 1 point of the unpruned network's 98%: uhaar up to 80%; dct and min-weight up to "
        "50%.",
        "At 50%: all, 98%.",
        "At 80%: uhaar, 97.5%, 3.5 points above min-weight's 94%.",
        "At 90%: dct, 97.5%, 37.5 points above min-weight's 60%.",
    )


def test_the_pictured_run_is_the_smallest_that_holds() -> None:
    runs = panel(
        uhaar=[0.98, 0.975, 0.96],
        dct=[0.98, 0.97, 0.9],
        min_weight=[0.98, 0.94, 0.6],
        random=[0.98, 0.98, 0.98],
    )
    (network,) = networks(runs)
    found = summary.chosen_run(network)
    assert found is not None
    run, why = found
    assert (run["wavelet"], run["sparsity"]) == ("uhaar", 0.8)
    assert why == "the smallest within 1 point of the unpruned network"
    beside = summary.companions(network, run)
    assert list(beside["label"]) == ["uhaar", "dct", "min-weight"]
    assert set(beside["sparsity"]) == {0.8}


def test_bases_that_never_transformed_a_kernel_are_told_by_their_layers() -> None:
    layers = pd.DataFrame(
        [
            # guid, wavelet, mode, level_used, shape
            ("a", "sym20", "zero", 0, "4x4x3x3"),
            ("a", "identity", None, 0, "4x4x1x1"),
            ("b", "outside", None, 0, "4x4x3x3"),
            ("c", "db1", "zero", 1, "4x4x3x3"),
            ("c", "db1", "zero", 0, "4x4x2x2"),
            ("d", "identity", None, 0, "4x4x3x3"),
        ],
        columns=["guid", "wavelet", "mode", "level_used", "shape"],
    ).assign(method="dwt")
    wavelets = {"a": "sym20", "b": "outside", "c": "db1", "d": "auto"}
    runs = pd.DataFrame({"guid": wavelets.keys(), "wavelet": wavelets.values(), "model": "net"})
    (sentence,) = summary.collapsed(runs, layers)
    assert sentence.startswith("Too long for every kernel of net: sym20. No transform ran")


def test_where_no_accuracy_holds_the_best_is_pictured() -> None:
    (network,) = networks(panel(uhaar=[0.7, 0.6, 0.5], min_weight=[0.8, 0.3, 0.2]))
    found = summary.chosen_run(network)
    assert found is not None
    assert found[0]["method"] == "min_weight"
    assert found[1].startswith("the best, for none is within 1 point")


def test_trainings_that_lack_runs_are_not_in_the_mean_of_the_others() -> None:
    one = panel(uhaar=[0.9, 0.9, 0.9], min_weight=[0.8, 0.8, 0.8])
    settings = [
        f'{{"model": {{"builtin": "demo", "seed": %d}}, "run": {i}}}' for i in range(len(one))
    ]
    full = [
        one.assign(model=f"net-{seed}", settings=[text % seed for text in settings])
        for seed in range(3)
    ]
    runs = pd.concat([full[0], full[1].head(3), full[2]], ignore_index=True)
    assert [network.models for network in networks(runs)] == [
        ("net-0", "net-2"),
        ("net-1",),
    ]


def test_the_same_results_give_the_same_page(results: Path, page: str, tmp_path: Path) -> None:
    write_page(results, tmp_path / "page.html")
    assert (tmp_path / "page.html").read_text(encoding="utf-8") == page
    assert len(page) < 2_000_000


def test_a_page_of_failures_says_so(tmp_path: Path) -> None:
    row = {
        "guid": "a-b",
        "sweep": "broken",
        "started": "2026-01-01T00:00:00+00:00",
        "finished": "2026-01-01T00:00:01+00:00",
        "status": "failed",
        "error": "ValueError: nothing to see",
        "model": "demo",
        "data": "digits",
        "method": "none",
        "batchnorm": "off",
        "matched": "",
        "settings": "{}",
        "versions": "{}",
    }
    with Store(tmp_path / "results.db", create=True) as store:
        store.add(row)
    write_page(tmp_path / "results.db", tmp_path / "page.html")
    texts = [text for _, text in Document((tmp_path / "page.html").read_text()).texts]
    assert "ValueError: nothing to see" in texts
    assert any("No run finished" in text for text in texts)


def test_without_a_run_there_is_no_page(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="does not exist"):
        write_page(tmp_path / "none.db", tmp_path / "page.html")
    with Store(tmp_path / "results.db", create=True):
        pass
    with pytest.raises(ValueError, match=r"results\.db has no run; run a sweep"):
        write_page(tmp_path / "results.db", tmp_path / "page.html")
    assert [path.name for path in tmp_path.iterdir() if path.suffix == ".html"] == []


def test_a_page_of_the_first_format_shows_every_run(tmp_path: Path) -> None:
    path = tmp_path / "results.db"
    connection = sqlite3.connect(path)
    connection.executescript(FIRST_FORMAT.read_text())
    connection.close()
    write_page(path, tmp_path / "page.html")
    text = (tmp_path / "page.html").read_text()
    assert "3 finished runs, 1 failed" in text
    # Accuracy, its spread and the sizes follow from what there is.
    assert "times smaller: uhaar" in text
    assert "by computed sizes" in text
    assert all(f">{guid}</td>" in text for guid in ("f4c6724a", "a5026de6", "e0ae8509"))
