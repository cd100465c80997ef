from __future__ import annotations

import itertools

import pandas as pd
import pytest

from wavprune.config import WAVELETS
from wavprune.reporting import series


def runs(**columns: object) -> pd.DataFrame:
    frame = pd.DataFrame({"method": "dwt", "wavelet": "haar", **columns})
    return frame.assign(top1=0.5) if "top1" not in frame else frame


KNOWN = ("auto", "uhaar", "haar", "dct", "klt", "identity", "min-weight", "random")


def test_every_basis_looks_like_itself_and_unlike_its_neighbors() -> None:
    styles = {name: series.basis_style(name) for name in (*KNOWN, *WAVELETS)}
    assert len({styles[name] for name in KNOWN}) == len(KNOWN)
    for one, other in itertools.pairwise(WAVELETS):
        assert styles[one] != styles[other]
    assert styles == {name: series.basis_style(name) for name in reversed(styles)}


def test_the_settings_that_vary_within_a_basis_are_in_its_label() -> None:
    frame = pd.DataFrame(
        {
            "method": ["dwt", "dwt", "dwt", "min_weight"],
            "wavelet": ["db2", "db2", "uhaar", None],
            "mode": ["symmetric", "zero", None, None],
            "level": [1, 1, None, None],
            "matched": ["", "bytes", "", ""],
        }
    )
    assert list(series.labels(frame)) == [
        "db2, symmetric",
        "db2, zero, bytes matched",
        "uhaar",
        "min-weight",
    ]


def test_seeds_and_models_are_repetitions_of_one_point() -> None:
    frame = runs(
        method="random",
        model=["a", "a", "b"],
        seed=[0, 1, 0],
        sparsity_requested=0.8,
        sparsity=[0.8, 0.81, 0.82],
        top1=[0.2, 0.4, 0.9],
    )
    (point,) = series.lines(frame, "sparsity", "top1").to_dict("records")
    assert point["x"] == pytest.approx(0.81)
    assert (point["y"], point["low"], point["high"], point["runs"]) == (
        pytest.approx(0.5),
        0.2,
        0.9,
        3,
    )


def test_matched_runs_are_told_apart_by_what_they_reached() -> None:
    frame = runs(
        method="min_weight", matched="kept", sparsity_requested=[0.5, 0.5], sparsity=[0.3, 0.6]
    )
    assert list(series.lines(frame, "sparsity", "top1")["x"]) == [0.3, 0.6]


def test_percentiles_are_points_of_their_own() -> None:
    frame = runs(percentile=[30.0, 60.0], sparsity_requested=None, sparsity=[0.1, 0.1])
    assert len(series.lines(frame, "sparsity", "top1")) == 2


def test_lines_end_with_what_all_else_is_compared_with() -> None:
    frame = pd.DataFrame(
        {
            "method": ["random", "min_weight", "dwt", "dwt"],
            "wavelet": [None, None, "sym8", "uhaar"],
            "sparsity": 0.5,
            "top1": 0.5,
        }
    )
    found = series.lines(frame, "sparsity", "top1")
    assert list(found["basis"]) == ["uhaar", "sym8", "min-weight", "random"]


def test_what_is_not_comparable_is_in_another_panel() -> None:
    frame = runs(scope=["layer", "global", "layer"], batchnorm=["match", "match", "off"])
    panels = series.panels(frame)
    assert set(panels) == {
        "scope layer, batch norm matched",
        "scope global, batch norm matched",
        "scope layer, batch norm not repaired",
    }
    assert sum(map(len, panels.values())) == 3
    targets = series.panels(runs(targets=["fc1", ""]))
    assert set(targets) == {"targets fc1", "no targets"}


def test_bases_from_outside_have_a_style_of_their_name() -> None:
    names = [f"own-{i}" for i in range(30)]
    styles = [series.basis_style(name) for name in names]
    assert styles == [series.basis_style(name) for name in names]
    assert len(set(styles)) > 10
    assert not set(styles) & {series.basis_style(name) for name in KNOWN}
    assert all(len(color) == 7 for color, _ in styles)


def test_a_method_from_outside_is_labeled_by_its_basis_too_where_it_has_several() -> None:
    frame = pd.DataFrame(
        {
            "method": ["dwt", "saliency", "saliency", "min_weight"],
            "wavelet": ["haar", "haar", "dct", None],
        }
    )
    assert list(series.labels(frame)) == ["haar", "saliency, haar", "saliency, dct", "min-weight"]
    assert list(series.labels(frame.iloc[[0, 1, 3]])) == ["haar", "saliency", "min-weight"]
