"""Which network is the smallest, what ties with it, and what the page says of that."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from wavprune.evaluation.spread import joint_error
from wavprune.reporting import plots
from wavprune.reporting.export import export
from wavprune.reporting.front import Front, front, headline
from wavprune.reporting.page import write_page
from wavprune.reporting.plots.front import front_by_bytes, visible_points
from wavprune.reporting.scale import Scale, scale_of, with_metric
from wavprune.sweep.store import Store

SAMPLES = 1800


def runs(*rows: tuple[str, float, float, float, int], **shared: Any) -> pd.DataFrame:
    """Rows of method or wavelet, sparsity, bytes, right answers of 1,800, and seed."""
    frame = pd.DataFrame(
        [
            {
                "guid": f"run{i}",
                "method": name if name in ("none", "min_weight", "random") else "dwt",
                "wavelet": None if name in ("none", "min_weight", "random") else name,
                "sparsity": sparsity,
                "sparsity_requested": sparsity,
                "bytes": size,
                "file_bytes": size,
                "top1": right / SAMPLES,
                "samples": SAMPLES,
                "model": f"net-{seed}",
                "bits": np.nan if name == "none" else 8,
                "epochs": None,
            }
            for i, (name, sparsity, size, right, seed) in enumerate(rows)
        ]
    )
    return with_metric(frame.assign(**shared))


DENSE = ("none", 0.0, 315_000.0, 1765.0, 0)


def found(*rows: tuple[str, float, float, float, int], scale: Scale | None = None) -> Front:
    frame = runs(DENSE, *rows)
    unpruned = frame["method"] == "none"
    return front(frame[unpruned], frame[~unpruned], scale or Scale())


def test_the_headline_is_the_smallest_that_is_as_good() -> None:
    result = found(
        ("uhaar", 0.9, 28_900, 1756, 0),
        ("uhaar", 0.95, 21_000, 1600, 0),
        ("uhaar", 0.8, 40_000, 1764, 0),
        ("min_weight", 0.8, 41_000, 1757, 0),
        ("min_weight", 0.9, 29_000, 1400, 0),
    )
    line, about = headline(result, Scale())
    assert line == "28.9 kB, 10.9 times smaller: uhaar, 90%, 8 bits, -0.5 points"
    assert about.startswith("The smallest within 1 point of the unpruned network's 98.1%")
    assert about.endswith("To be as good, min-weight 41 kB is needed.")
    assert [row.point.bytes for row in result.rows] == [21_000, 28_900, 40_000]
    # 8 answers of 1,800 may be chance.
    assert [row.tie is not None for row in result.rows] == [False, False, True]


def test_no_headline_is_made_of_four_answers() -> None:
    result = found(("uhaar", 0.9, 28_900, 1764, 0), ("min_weight", 0.9, 28_950, 1760, 0))
    line, about = headline(result, Scale())
    assert "uhaar" in line
    assert "A tie with min-weight: as small, and no worse than chance." in about
    turned = found(("uhaar", 0.9, 28_950, 1764, 0), ("min_weight", 0.9, 28_900, 1760, 0))
    assert [row.tie is not None for row in turned.rows] == [False, True]


def test_pairs_on_the_same_samples_say_more_than_each_alone() -> None:
    rows = [("uhaar", 0.9, 28_900.0, 1764.0, 0), ("uhaar", 0.8, 40_000.0, 1778.0, 0)]
    assert found(*rows).rows[1].tie is not None
    frame = runs(DENSE, *rows)
    frame["change_spread"] = 0.001
    known = front(frame[:1], frame[1:], Scale())
    assert known.rows[1].tie is None


def test_where_nothing_is_good_enough_it_says_so() -> None:
    worse = found(("uhaar", 0.95, 21_000, 1600, 0))
    assert headline(worse, Scale()) == (
        "No run is within 1 point of the unpruned network's 98.1%.",
        "",
    )
    wide = Scale(asked=0.1)
    larger = found(("uhaar", 0.95, 21_000, 1600, 0), scale=wide)
    assert headline(larger, wide)[0].startswith("21 kB, 15 times smaller")
    frame = runs(("uhaar", 0.9, 28_900, 1756, 0))
    alone = front(frame[:0], frame, Scale())
    assert headline(alone, Scale())[0] == ""
    assert "no finished run to compare with" in headline(alone, Scale())[1]


@pytest.mark.parametrize(
    ("dense", "stored", "line"),
    [
        (2_000, 20_000, "20 kB, 10 times larger: uhaar"),
        (20_010, 20_000, "20 kB, no smaller: uhaar"),
        (math.nan, 20_000, "20 kB: uhaar"),
        (3_998_400, 999_600, "1 MB, 4 times smaller: uhaar"),
    ],
)
def test_a_headline_of_any_sizes(dense: float, stored: float, line: str) -> None:
    frame = runs(("none", 0.0, dense, 1765, 0), ("uhaar", 0.9, stored, 1765, 0))
    assert headline(front(frame[:1], frame[1:], Scale()), Scale())[0].startswith(line)


def test_calibrated_points_say_so_once() -> None:
    frame = runs(DENSE, *(("uhaar", 0.9, size, 1764, 0) for size in (28_900.0, 40_000.0)))
    for levels, labels in (
        ([None, "full", "full"], ["uhaar, 90%, calibrated full, 8 bits"]),
        ([None, "full", None], ["uhaar, calibrated full, 90%, 8 bits", "uhaar, 90%, 8 bits"]),
    ):
        frame["calibrated"] = levels
        found = front(frame[:1], frame[1:], Scale())
        assert [point.name for point in found.points] == labels


def test_repetitions_are_one_point_with_the_spread_of_both() -> None:
    result = found(
        *(("none", 0.0, 315_000, 1765 + seed, seed) for seed in (1, 2)),
        *(("uhaar", 0.9, 28_900 + seed, 1756 - 9 * seed, seed) for seed in (0, 1, 2)),
    )
    (point,) = result.points
    assert len(point.runs) == 3
    assert point.bytes == 28_901
    assert point.value == pytest.approx(1747 / 1800)
    # Each training is compared with its own network.
    assert point.change == pytest.approx(np.mean([-9, -19, -29]) / 1800)
    between = np.std([1756, 1747, 1738], ddof=1) / 1800 / math.sqrt(3)
    alone = joint_error([point.value], [found(("uhaar", 0.9, 1, 1747, 0)).points[0].spread])
    assert point.spread == pytest.approx(math.hypot(alone, between), rel=0.02)


def test_lower_is_better_where_the_metric_says_so() -> None:
    frame = runs(DENSE, ("uhaar", 0.9, 28_900, 0, 0), ("min_weight", 0.9, 28_000, 0, 0)).assign(
        metric="MSE", higher_is_better=0, top1=np.nan, spread=0.001
    )
    frame["value"] = [0.5, 0.503, 0.52]
    scale = scale_of(frame)
    result = front(frame[:1], frame[1:], scale)
    assert [row.point.basis for row in result.rows] == ["min-weight", "uhaar"]
    line, about = headline(result, scale)
    assert line == "28.9 kB, 10.9 times smaller: uhaar, 90%, 8 bits, +0.003"
    assert about.startswith("The smallest within 0.005 of the unpruned network's 0.5")
    figure = plots.accuracy_by_sparsity(frame)
    assert figure.axes[0].get_ylabel() == "MSE (lower is better)"


def test_the_picture_shows_the_front_and_what_is_near_it() -> None:
    result = found(
        ("uhaar", 0.9, 28_900, 1756, 0),
        ("dct", 0.9, 29_900, 1750, 0),
        ("uhaar", 0.99, 30_000, 200, 0),
    )
    assert [point.sparsity for point in visible_points(result, Scale())] == [0.9, 0.9]
    wide, narrow = (front_by_bytes(result, Scale(), width) for width in (7.6, 4.3))
    for figure in (wide, narrow):
        (ax,) = figure.axes
        labels = [text.get_text() for text in figure.legends[0].get_texts()]
        assert sorted(labels) == ["dct", "front", "headline", "uhaar", "unpruned"]
        assert ax.get_ylim()[0] > 0.85
    assert narrow.get_size_inches()[0] < wide.get_size_inches()[0]


def test_pages_of_other_metrics_and_stored_files(tmp_path: Path) -> None:
    path = tmp_path / "results.db"
    base = {
        "sweep": "restore",
        "started": "2026-01-01T00:00:00+00:00",
        "finished": "2026-01-01T00:00:01+00:00",
        "status": "ok",
        "model": "net",
        "data": "pairs",
        "batchnorm": "off",
        "matched": "",
        "versions": "{}",
        "samples": 50,
        "parameters": 900,
        "metric": "PSNR",
        "higher_is_better": 1,
        "spread": 0.02,
    }
    rows: list[dict[str, Any]] = [
        {"method": "none", "value": 31.0, "sparsity": 0.0, "stored_bytes": 3600}
    ]
    rows += [
        {
            "method": "dwt",
            "wavelet": "uhaar",
            "value": 31 - sparsity / bits,
            "sparsity": sparsity,
            "sparsity_requested": sparsity,
            "bits": bits,
            "epochs": epochs,
            "stored_bytes": 3000,
            "file_bytes": round(100 * bits * (1 - sparsity)) + (epochs or 0),
            "change_spread": 0.01,
        }
        for sparsity in (0.5, 0.9)
        for bits in (8, 4)
        for epochs in (None, 2)
    ]
    with Store(path, create=True) as store:
        for i, row in enumerate(rows):
            store.add({**base, "guid": f"run-{i}", "settings": '{"model": {}}', **row})
    write_page(path, tmp_path / "page.html")
    text = (tmp_path / "page.html").read_text()
    assert "<h1>restore</h1>" in text
    assert "net on pairs: PSNR" in text
    assert "40 B, 90 times smaller: uhaar, 90%, 4 bits, -0.225" in text
    assert text.count("<h3>") >= 4
    assert "2 epochs, 8 bits" in text.replace("</h3>", "")
    assert "top-1" not in text.partition("<script>")[0].replace("top-1 accuracy by", "")
    export(path, tmp_path / "runs.csv")
    assert "file_bytes" in (tmp_path / "runs.csv").read_text().splitlines()[0]
