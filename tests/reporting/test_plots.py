from __future__ import annotations

import io
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
import pytest
import torch
from matplotlib.collections import QuadMesh
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from torch import nn

import wavprune
from wavprune import plots
from wavprune.report import PruneReport
from wavprune.reporting import series

LONG = "encoder.stages.0.blocks.11.a_very_long_name_of_a_convolution.conv"


@pytest.fixture(autouse=True)
def settings_stay_as_they_are() -> Iterator[None]:
    before = dict(mpl.rcParams)
    yield
    assert dict(mpl.rcParams) == before


def runs() -> pd.DataFrame:
    rows: list[dict[str, Any]] = [
        {"method": "none", "sparsity": 0.0, "top1": 0.99, "stored_bytes": 400_000}
    ]
    for sparsity, size in ((0.5, 210_000), (0.9, 50_000), (0.95, 30_000)):
        same = {"sparsity": sparsity, "stored_bytes": size, "scope": "global"}
        for wavelet, top1 in (("uhaar", 0.985), ("haar", 0.98)):
            rows.append({"method": "dwt", "wavelet": wavelet, "top1": top1 - sparsity / 9, **same})
        rows.append({"method": "min_weight", "top1": 0.98 - sparsity / 5, **same})
        for seed in range(3):
            rows.append({"method": "random", "seed": seed, "top1": 0.2 + 0.05 * seed, **same})
    return pd.DataFrame(rows)


def network() -> nn.Module:
    torch.manual_seed(0)
    layers = {"stem": nn.Conv2d(3, 8, 5), "point": nn.Conv2d(8, 8, 1), "last": nn.Conv2d(8, 8, 3)}
    return nn.Sequential(nn.ModuleDict(layers))


@pytest.fixture
def report() -> PruneReport:
    return wavprune.fast.prune(network(), wavelet="haar", sparsity=0.6, scope="global")


def inside(figure: Figure) -> bool:
    """Whether all that is visible lies on the canvas, but for a pixel of rounding."""
    figure.savefig(io.BytesIO(), dpi=100)
    box, (width, height) = figure.get_tightbbox(), figure.get_size_inches()
    slack = 0.01
    return bool(
        box.x0 >= -slack
        and box.y0 >= -slack
        and box.x1 <= width + slack
        and box.y1 <= height + slack
    )


def legend(figure: Figure) -> list[str]:
    return [text.get_text() for text in figure.legends[0].get_texts()]


def line(figure: Figure, label: str, panel: int = 0) -> Line2D:
    (found,) = [each for each in figure.axes[panel].lines if each.get_label() == label]
    return found


@pytest.mark.parametrize(
    ("draw", "x"),
    [(plots.accuracy_by_sparsity, "sparsity"), (plots.accuracy_by_bytes, "stored_bytes")],
)
def test_accuracy_is_that_of_the_runs(draw: Any, x: str) -> None:
    frame = runs()
    figure = draw(frame)
    for label, rows in (
        ("uhaar", frame[frame["wavelet"] == "uhaar"]),
        ("haar", frame[frame["wavelet"] == "haar"]),
        ("min-weight", frame[frame["method"] == "min_weight"]),
    ):
        drawn = line(figure, label)
        expected = rows.sort_values(x)
        np.testing.assert_allclose(np.asarray(drawn.get_xdata()), expected[x])
        np.testing.assert_allclose(np.asarray(drawn.get_ydata()), expected["top1"])
        assert to_hex(str(drawn.get_color())).upper() == series.basis_style(label)[0].upper()
    assert np.asarray(line(figure, "unpruned").get_ydata()).tolist() == [0.99, 0.99]
    assert legend(figure) == ["unpruned", "uhaar", "haar", "min-weight", "random"]
    assert inside(figure)


def test_repetitions_are_a_mean_in_a_band_to_their_extremes() -> None:
    figure = plots.accuracy_by_sparsity(runs())
    np.testing.assert_allclose(np.asarray(line(figure, "random").get_ydata()), 0.25)
    paths = [path for band in figure.axes[0].collections for path in band.get_paths()]
    heights = np.concatenate([np.asarray(path.vertices)[:, 1] for path in paths])
    assert {0.2, 0.3} <= set(heights.round(6))
    title = figure.legends[0].get_title().get_text()
    assert "mean" in title
    alone = runs().query("method != 'random'")
    assert plots.accuracy_by_sparsity(alone).legends[0].get_title().get_text() == ""


def test_settings_that_differ_are_panels_with_the_same_unpruned_line() -> None:
    frame = runs()
    other = frame[frame["method"] != "none"].assign(scope="layer", top1=lambda f: f["top1"] / 2)
    figure = plots.accuracy_by_sparsity(pd.concat([frame, other], ignore_index=True))
    assert [ax.get_title() for ax in figure.axes] == ["scope global", "scope layer"]
    for panel, factor in ((0, 1.0), (1, 0.5)):
        np.testing.assert_allclose(
            np.asarray(line(figure, "uhaar", panel).get_ydata()),
            factor * frame[frame["wavelet"] == "uhaar"]["top1"],
        )
        assert np.asarray(line(figure, "unpruned", panel).get_ydata())[0] == 0.99
    assert inside(figure)


def test_what_is_measured_is_what_the_axis_names() -> None:
    figure = plots.accuracy_by_sparsity(runs())
    figure.savefig(io.BytesIO())
    shown = [label.get_text() for label in figure.axes[0].get_xticklabels()]
    assert shown == ["50%", "90%", "95%"]
    sizes = plots.accuracy_by_bytes(runs())
    sizes.savefig(io.BytesIO())
    assert [t.get_text() for t in sizes.axes[0].get_xticklabels()] == ["30 kB", "50 kB", "210 kB"]


@pytest.mark.parametrize("accuracy", [0.0, 1.0])
def test_all_wrong_and_all_right_have_a_place(accuracy: float) -> None:
    frame = runs().assign(top1=accuracy)
    figure = plots.accuracy_by_sparsity(frame)
    assert inside(figure)
    low, high = figure.axes[0].get_ylim()
    assert low <= accuracy <= high


def test_compared_trials_are_drawn_as_they_are() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(1, 6, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    data = [(torch.randn(40, 1, 8, 8), torch.arange(40) % 6)]
    found = wavprune.compare(net, data, wavelets=("uhaar",), sparsities=(0.5, 0.8), seeds=(0,))
    frame = found.to_dataframe()
    figure = plots.accuracy_by_sparsity(frame)
    expected = frame[frame["wavelet"] == "uhaar"].sort_values("sparsity")
    (drawn,) = [each for each in figure.axes[0].lines if str(each.get_label()).startswith("uhaar")]
    np.testing.assert_allclose(np.asarray(drawn.get_ydata()), expected["top1"])


def test_runs_without_an_accuracy_are_an_error() -> None:
    with pytest.raises(ValueError, match="no pruned run"):
        plots.accuracy_by_sparsity(runs().assign(top1=np.nan))
    with pytest.raises(ValueError, match="no pruned run"):
        plots.accuracy_by_sparsity(runs().head(1))
    with pytest.raises(ValueError, match="no column stored_bytes"):
        plots.accuracy_by_bytes(runs().drop(columns="stored_bytes"))


@pytest.mark.parametrize(
    ("draw", "column"),
    [(plots.error_by_layer, "relative_error"), (plots.sparsity_by_layer, "sparsity")],
)
def test_layers_are_those_of_the_report(report: PruneReport, draw: Any, column: str) -> None:
    figure = draw(report)
    drawn = line(figure, "haar")
    expected = [getattr(layer, column) for layer in report]
    np.testing.assert_allclose(np.asarray(drawn.get_xdata()), expected)
    np.testing.assert_allclose(np.asarray(drawn.get_ydata()), [0, 1, 2])
    labels = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    assert labels == ["0.stem  5x5", "0.point  1x1", "0.last  3x3"]
    assert inside(figure)


def test_several_runs_are_side_by_side_in_a_row() -> None:
    frames, rows = [], []
    for method, wavelet in (("dwt", "haar"), ("dwt", "dct"), ("min_weight", None)):
        report = wavprune.fast.prune(
            network(), method=method, wavelet=wavelet or "uhaar", sparsity=0.7
        )
        guid = f"{method}-{wavelet}"
        frames.append(report.to_dataframe().assign(guid=guid))
        rows.append({"guid": guid, "method": method, "wavelet": wavelet})
    layers = pd.concat(frames)
    for known in (None, pd.DataFrame(rows)):
        figure = plots.error_by_layer(layers, known)
        assert legend(figure) == ["haar", "dct", "min-weight"]
        places = [np.asarray(line(figure, label).get_ydata()) for label in legend(figure)]
        assert all(np.all(np.abs(place - [0, 1, 2]) < 0.5) for place in places)
        assert np.all(np.diff(places, axis=0) > 0.1)
        assert inside(figure)
    with pytest.raises(ValueError, match="no row of the run 'dwt-dct'"):
        plots.error_by_layer(layers, pd.DataFrame(rows[:1]))


def test_layers_of_too_many_runs_or_of_none_are_an_error(report: PruneReport) -> None:
    frame = report.to_dataframe()
    many = pd.concat([frame.assign(guid=str(i)) for i in range(9)])
    with pytest.raises(ValueError, match="9 runs; allowed: 8"):
        plots.error_by_layer(many)
    with pytest.raises(ValueError, match="no layer"):
        plots.error_by_layer(frame.head(0))


@pytest.mark.parametrize("name", [LONG, "a$b_{c$", r"$\frac$", "<script>"])
def test_every_name_of_a_layer_can_be_drawn(report: PruneReport, name: str) -> None:
    frame = report.to_dataframe()
    frame.loc[0, "name"] = name
    assert inside(plots.error_by_layer(frame))
    histogram = {"edges": [0.0, 1.0], "counts": [3], "threshold": 0.5}
    assert inside(plots.coefficient_histogram({name: histogram}))


def test_a_deep_network_is_as_high_as_a_page_and_names_some_layers(report: PruneReport) -> None:
    frame = pd.concat([report.to_dataframe()] * 60, ignore_index=True)
    frame["name"] = [f"layer{i}" for i in range(len(frame))]
    figure = plots.error_by_layer(frame)
    assert inside(figure)
    assert figure.get_size_inches()[1] < 20
    assert len(np.asarray(line(figure, "haar").get_xdata())) == 180
    assert 30 < len(figure.axes[0].get_yticks()) <= 60


def test_a_histogram_has_the_counts_and_the_threshold() -> None:
    weight = np.random.default_rng(0).normal(size=4000)
    counts, edges = np.histogram(weight, bins=50)
    names = [f"layer{i}" for i in range(7)]
    both = {"edges": edges.tolist(), "counts": counts.tolist(), "threshold": 0.7}
    figure = plots.coefficient_histogram(dict.fromkeys(names, both), "importance")
    assert [ax.get_title() for ax in figure.axes] == names
    ax = figure.axes[0]
    (steps,) = [patch for patch in ax.patches if hasattr(patch, "get_data")]
    np.testing.assert_array_equal(steps.get_data().values, counts)
    assert sorted(float(np.asarray(each.get_xdata())[0]) for each in ax.lines) == [-0.7, 0.7]
    assert figure.get_supxlabel() == "importance"
    assert inside(figure)


def test_magnitudes_have_one_threshold_and_random_pruning_none() -> None:
    layer = {"edges": [0.0, 1.0, 2.0], "counts": [3, 2], "threshold": 0.5}
    assert len(plots.coefficient_histogram({"a": layer}).axes[0].lines) == 1
    assert not plots.coefficient_histogram({"a": {**layer, "threshold": None}}).axes[0].lines


def test_histograms_that_do_not_fit_are_an_error() -> None:
    with pytest.raises(ValueError, match="no layer"):
        plots.coefficient_histogram({})
    with pytest.raises(ValueError, match="layer 'a': 2 counts do not fit 2 edges"):
        plots.coefficient_histogram({"a": {"edges": [0, 1], "counts": [1, 2]}})


def test_kernels_are_a_grid_in_one_color_scale() -> None:
    before = torch.randn(5, 2, 3, 3, generator=torch.Generator().manual_seed(0)).numpy()
    after = np.where(np.abs(before) > 1, before, 0)
    figure = plots.kernels_before_after(before, after)
    images = [ax.images[0] for ax in figure.axes[:2]]
    assert images[0].get_clim() == images[1].get_clim()
    for image, kernels in zip(images, (before, after), strict=True):
        shown = np.asarray(image.get_array(), dtype=float)
        assert shown.shape == (3 * 7 - 1, 4 * 7 - 1)
        for i, kernel in enumerate(kernels.reshape(10, 3, 3)):
            top, left = i // 4 * 7, i % 4 * 7
            np.testing.assert_allclose(shown[top : top + 6 : 2, left : left + 6 : 2], kernel)
    assert inside(figure)


@pytest.mark.parametrize("shape", [(1, 1, 1), (64, 3, 7, 7), (2, 40, 2), (1, 1, 64, 256)])
def test_kernels_of_every_shape_fit(shape: tuple[int, ...]) -> None:
    assert inside(plots.kernels_before_after(np.ones(shape), np.zeros(shape)))


@pytest.mark.parametrize(("before", "after"), [((2, 3, 3), (3, 3, 3)), ((3, 3), (3, 3))])
def test_kernels_of_another_shape_are_an_error(before: Any, after: Any) -> None:
    with pytest.raises(ValueError, match=r"before is \(.*allowed"):
        plots.kernels_before_after(np.zeros(before), np.zeros(after))


def test_a_confusion_matrix_has_counts_and_shares() -> None:
    counts = np.array([[8, 2, 0], [1, 9, 0], [0, 0, 0]])
    figure = plots.confusion_matrix(
        counts, names=["cat", "dog", "a very long name of a class, so long"]
    )
    ax = figure.axes[0]
    assert [text.get_text() for text in ax.texts] == ["8", "2", "", "1", "9", "", "", "", ""]
    (mesh,) = [each for each in ax.collections if isinstance(each, QuadMesh)]
    shares = np.asarray(mesh.get_array(), dtype=float).reshape(3, 3)
    np.testing.assert_allclose(shares, [[0.8, 0.2, 0.0], [0.1, 0.9, 0.0], [0.0, 0.0, 0.0]])
    assert [label.get_text() for label in ax.get_yticklabels()][:2] == ["cat", "dog"]
    assert inside(figure)


def test_many_classes_are_drawn_without_their_numbers() -> None:
    figure = plots.confusion_matrix(np.eye(300, dtype=int))
    assert not figure.axes[0].texts
    assert [label.get_text() for label in figure.axes[0].get_xticklabels()][-1] == "299"
    assert inside(figure)
    image = io.StringIO()
    figure.savefig(image, format="svg")
    assert len(image.getvalue()) < 500_000


def test_confusions_that_are_none_are_an_error() -> None:
    with pytest.raises(ValueError, match=r"confusion is \(2, 3\)"):
        plots.confusion_matrix(np.zeros((2, 3)))
    with pytest.raises(ValueError, match="names has 1 entries for 2 classes"):
        plots.confusion_matrix(np.eye(2), names=["one"])


def test_pyplot_has_no_figure_afterwards() -> None:
    script = (
        "import matplotlib; from wavprune import plots; plots.confusion_matrix([[1]]); "
        "import matplotlib.pyplot as plt; assert plt.get_fignums() == []"
    )
    subprocess.run([sys.executable, "-W", "error", "-c", script], check=True)


def test_a_mix_of_bases_is_not_called_by_one_of_them(report: PruneReport) -> None:
    mixed = report.to_dataframe()
    mixed.loc[mixed["name"] == "0.last", "wavelet"] = "identity"
    assert legend(plots.error_by_layer(mixed)) == ["auto"]


def test_a_basis_from_outside_is_drawn_like_any_other() -> None:
    frame = pd.concat(
        [runs(), runs().query("wavelet == 'haar'").assign(wavelet="hadamard")], ignore_index=True
    )
    figure = plots.accuracy_by_sparsity(frame)
    assert legend(figure) == ["unpruned", "uhaar", "haar", "hadamard", "min-weight", "random"]
    color, marker = series.basis_style("hadamard")
    assert line(figure, "hadamard").get_color() == color
    assert line(figure, "hadamard").get_marker() == marker
