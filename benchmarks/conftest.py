"""Print the speed and memory ratios beside their targets, after the timings."""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Literal, NamedTuple

import pytest

import wavprune

from .pipelines import FLOOR, PEERS

if TYPE_CHECKING:
    # Only where something is printed: bench_gpu.py runs where there is no rich.
    from rich.table import Table

Kind = Literal["speed", "time", "memory"]


class Target(NamedTuple):
    """The bound that a ratio should keep.

    Attributes:
        group: the network, or another group of rows.
        row: the row that the target is for; its first word is the backend.
        against: the row it is compared with; ``LARGEST`` for memory.
        kind: ``"speed"``: times as fast, at least; ``"time"``: times as long, at most;
            ``"memory"``: extra memory at the peak over the bytes of the largest layer, at most.
        bound: the ratio.
    """

    group: str
    row: str
    against: str
    kind: Kind
    bound: float


RESNET, LITE = "ResNet-18", "EfficientNet-Lite0"
TRAINING = "ResNet-18 in training, 64 images of 32x32"
COEFFICIENTS, SCALING = "dwt2 + idwt2 of 1M 3x3 kernels", "haar, time per 1M weights"
WAVELET_TRANSFORMS = "WaveletTransforms haar"
L1 = "l1_unstructured"
RESNET_LAYOUTS, LITE_LAYOUTS = "ResNet-18, layouts and dtypes", "EfficientNet-Lite0, layouts"
WIDE_KERNELS = "wide kernels"
CONTIGUOUS_STEP, CHANNELS_LAST_STEP = "float32 contiguous step", "bfloat16 channels_last step"
LARGEST = "largest layer"
SWEEPS = "sweeps"

TARGETS = (
    Target(RESNET, "eager haar", WAVELET_TRANSFORMS, "speed", 10),
    Target(RESNET, "native haar", WAVELET_TRANSFORMS, "speed", 200),
    Target(RESNET, "native haar", L1, "speed", 100),
    Target(RESNET, "native haar", "native min-weight", "time", 2),
    Target(RESNET, "native haar", FLOOR.name, "time", 3),
    Target(RESNET, "native haar global", "native haar", "time", 1.2),
    Target(RESNET, "native haar", LARGEST, "memory", 0.05),
    Target(RESNET, "native uhaar", WAVELET_TRANSFORMS, "speed", 150),
    Target(RESNET, "native uhaar", L1, "speed", 80),
    Target(RESNET, "native uhaar", "native min-weight", "time", 2.2),
    Target(RESNET, "native uhaar", FLOOR.name, "time", 4),
    Target(RESNET, "native min-weight", FLOOR.name, "time", 2),
    Target(RESNET, "native klt", "native dct", "time", 2.5),
    Target(RESNET, "native random", "native min-weight", "time", 2.5),
    Target(RESNET, "native auto", "native uhaar", "time", 4),
    Target(RESNET, "native auto global", "native uhaar", "time", 6),
    Target(LITE, "native uhaar", WAVELET_TRANSFORMS, "speed", 40),
    Target(LITE, "native uhaar", L1, "speed", 60),
    Target(LITE, "native uhaar", "native min-weight", "time", 1.3),
    Target(TRAINING, "projection, uhaar", "training step", "time", 0.03),
    Target(TRAINING, "projection, min-weight", "training step", "time", 0.03),
    Target(COEFFICIENTS, "native", "PyWavelets", "speed", 30),
    Target(COEFFICIENTS, "native", "ptwt", "speed", 30),
    *(
        Target(RESNET_LAYOUTS, f"float32 {row}", f"float32 {row.split()[0]} L", "time", bound)
        for row, bound in (
            ("contiguous haar", 1.6),
            ("contiguous uhaar", 1.6),
            ("contiguous min-weight", 1.4),
            ("channels_last uhaar", 1.5),
            ("channels_last min-weight", 1.4),
        )
    ),
    *(
        Target(RESNET_LAYOUTS, f"{dtype} {row}", f"float32 {row}", "time", bound)
        for dtype, bound in (("bfloat16", 1), ("float16", 1), ("float64", 2.2))
        for row in ("contiguous uhaar", "channels_last uhaar")
    ),
    Target(RESNET_LAYOUTS, CHANNELS_LAST_STEP, CONTIGUOUS_STEP, "time", 1),
    Target(LITE_LAYOUTS, "outputs innermost uhaar", "contiguous uhaar", "time", 1.2),
    *(
        Target(WIDE_KERNELS, f"{size} {method}", f"{size} L", "time", 2)
        for size in ("5x5", "7x7")
        for method in ("uhaar", "dct")
    ),
    *(Target(SCALING, size, "256M", "time", 1.15) for size in ("1M", "4M", "16M", "64M")),
)

# Other programs on the same cores make torch many times slower. A median of more than this many
# times the minimum shows that this happened.
BUSY = 2.0

# Backends that serve as baselines, like the peers.
BASELINES = ("reference", "ptwt")


class Result(NamedTuple):
    """Median and minimum time of a row, and its memory where that was measured."""

    seconds: float
    fastest: float
    peak_bytes: int | None
    largest_layer_bytes: int | None


Results = Mapping[str, Result]


@pytest.hookimpl(trylast=True)
def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    session = getattr(config, "_benchmarksession", None)
    groups: dict[str, dict[str, Result]] = {}
    for timed in getattr(session, "benchmarks", ()):
        if timed.stats.rounds:
            # Rows that state their number of weights are compared by the time per million.
            millions = timed.extra_info.get("weights", 1e6) / 1e6
            groups.setdefault(timed.group, {})[timed.extra_info["row"]] = Result(
                timed.stats.median / millions,
                timed.stats.min / millions,
                timed.extra_info.get("peak_bytes"),
                timed.extra_info.get("largest_layer_bytes"),
            )
    told = [timed for timed in getattr(session, "benchmarks", ()) if "line" in timed.extra_info]
    if told:
        terminalreporter.section("runs an hour, and where the time goes")
    for timed in told:
        terminalreporter.write_line(f"{timed.extra_info['row']}: {timed.extra_info['line']}")
    for group, results in groups.items():
        if group == SWEEPS:
            continue
        terminalreporter.section(f"{group}: ratios of medians")
        terminalreporter.write(rendered(ratios(group, results)))
        terminalreporter.write(rendered(memory(group, results)))
        disturbed = busy(results)
        if disturbed:
            terminalreporter.write_line(disturbed, yellow=True)


def ratios(group: str, results: Results) -> Table:
    """The medians of rows that are compared, and their ratios."""
    table = _table("row", "ms", "compared with", "ms", "ratio", "target", "")
    last = ""
    for row, against, kind in comparisons(group):
        target = _target(group, row, against)
        ours, other = results.get(row), results.get(against)
        if target is None and (ours is None or other is None):
            continue
        value = None
        if ours and other:
            value = (
                other.seconds / ours.seconds if kind == "speed" else ours.seconds / other.seconds
            )
        if row != last and last:
            table.add_row()
        table.add_row(
            "" if row == last else row,
            "" if row == last else _milliseconds(ours),
            against,
            _milliseconds(other),
            _amount(kind, value),
            *_verdict(target, value),
        )
        last = row
    return table


def memory(group: str, results: Results) -> Table:
    """Extra memory at the peak, relative to the largest layer."""
    table = _table("row", "extra memory at the peak", "relative to the largest layer", "target", "")
    targeted = [t.row for t in TARGETS if t.group == group and t.kind == "memory" and _exists(t)]
    for row in dict.fromkeys([*results, *targeted]):
        target = _target(group, row, LARGEST)
        result = results.get(row)
        peak = result.peak_bytes if result else None
        if peak is None and target is None:
            continue
        largest = result.largest_layer_bytes if result else None
        share = peak / largest if peak is not None and largest else None
        table.add_row(
            row,
            "-" if peak is None else f"{peak / 2**20:.1f} MiB",
            _amount("memory", share),
            *_verdict(target, share),
        )
    return table


def comparisons(group: str) -> Iterator[tuple[str, str, Kind]]:
    """Pairs of rows to compare: every backend with every peer, and all pairs with a target."""
    for backend in wavprune.backends.names():
        if backend in BASELINES:
            continue
        pairs: dict[tuple[str, str], Kind] = {}
        for row in (f"{backend} haar", f"{backend} uhaar"):
            pairs[row, f"{backend} min-weight"] = "time"
            pairs[row, FLOOR.name] = "time"
            for peer in PEERS:
                pairs[row, peer.name] = "speed"
            for baseline in BASELINES:
                pairs[row, f"{baseline} haar"] = "speed"
        pairs[f"{backend} haar global", f"{backend} haar"] = "time"
        pairs[f"{backend} min-weight", FLOOR.name] = "time"
        for target in TARGETS:
            if target.group == group and target.row.startswith(f"{backend} "):
                pairs[target.row, target.against] = target.kind
        order = list(dict.fromkeys(row for row, _ in pairs))
        for (row, against), kind in sorted(pairs.items(), key=lambda pair: order.index(pair[0][0])):
            if kind != "memory":
                yield row, against, kind
    if group not in (RESNET, LITE):
        for target in TARGETS:
            if target.group == group:
                yield target.row, target.against, target.kind


def busy(results: Results) -> str:
    """A warning where other programs disturbed the timings, else an empty string."""
    rows = [row for row, result in results.items() if result.seconds > BUSY * result.fastest]
    if not rows:
        return ""
    return (
        f"Other programs disturbed these timings: the median round took more than {BUSY:g} times "
        f"as long as the fastest in {', '.join(rows)}. Run them again on an idle machine.\n"
    )


def rendered(table: Table) -> str:
    """The table as text; an empty string for a table without rows."""
    if not table.rows:
        return ""
    from rich.console import Console

    text = io.StringIO()
    Console(file=text, width=120, color_system=None).print(table)
    return "\n".join(line.rstrip() for line in text.getvalue().splitlines()) + "\n\n"


def _table(*columns: str) -> Table:
    from rich.table import Table

    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for column in columns:
        words = column in ("row", "compared with", "")
        table.add_column(column, justify="left" if words else "right", no_wrap=True)
    return table


def _exists(target: Target) -> bool:
    return target.row.split()[0] in wavprune.backends.names()


def _target(group: str, row: str, against: str) -> Target | None:
    for target in TARGETS:
        if (target.group, target.row, target.against) == (group, row, against):
            return target
    return None


def _verdict(target: Target | None, value: float | None) -> tuple[str, str]:
    if target is None:
        return "", ""
    number = f"{target.bound:.0%}" if target.kind == "memory" else f"{target.bound:g}x"
    bound = f"at {'least' if target.kind == 'speed' else 'most'} {number}"
    if value is None:
        return bound, "not measured"
    met = value >= target.bound if target.kind == "speed" else value <= target.bound
    return bound, "ok" if met else "missed"


def _amount(kind: Kind, value: float | None) -> str:
    if value is None:
        return "-"
    if kind == "memory":
        return f"{value:.0%}"
    decimals = 2 if value < 10 else 1 if value < 100 else 0
    return f"{value:.{decimals}f}x the {kind}"


def _milliseconds(result: Result | None) -> str:
    return "-" if result is None else f"{result.seconds * 1e3:.1f}"
