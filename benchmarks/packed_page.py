"""Writes the tables of calibrated checkpoints: ``python -m benchmarks.packed_page``.

They come from ``docs/findings/packed.csv`` and ``packed_ratios.csv``, which ``packed.py`` writes,
and go between two marks of ``docs/findings/checkpoints.md``. Nothing is run.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple, TypeVar, get_type_hints

FINDINGS = Path(__file__).parents[1] / "docs" / "findings"
BEGIN, END = "<!-- packed -->\n", "<!-- /packed -->\n"
BASELINES = ("NNCodec", "CERWU")


class Row(NamedTuple):
    """One file."""

    network: str
    setting: str
    calibration: int
    tests: int
    target_kl: float
    bytes: int
    predicted_kl: float
    held_out_kl: float
    test_kl: float
    test_kl_error: float
    score: float
    dense_score: float
    measure: str
    encode_seconds: float
    decode_seconds: float
    weights: int


class Ratio(NamedTuple):
    """Two settings at the same change of the outputs; ``upper`` is the ratio's 95% upper bound."""

    network: str
    setting: str
    other: str
    at: str
    bytes: int
    other_bytes: int
    ratio: float
    upper: float


Kind = TypeVar("Kind", Row, Ratio)


def read(path: Path, kind: type[Kind]) -> list[Kind]:
    if not path.exists():
        return []
    with path.open(newline="") as file:
        types = get_type_hints(kind)
        return [
            kind(*(types[name](row[name]) for name in kind._fields)) for row in csv.DictReader(file)
        ]


def write(path: Path, rows: Sequence[Row] | Sequence[Ratio]) -> None:
    with path.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(rows[0]._fields if rows else [])
        for row in rows:
            writer.writerow([f"{v:.6g}" if isinstance(v, float) else v for v in row])


def page(rows: Sequence[Row], ratios: Sequence[Ratio]) -> str:
    lines: list[str] = []
    for name in dict.fromkeys(row.network for row in rows):
        of_network = [row for row in rows if row.network == name]
        lines += _files(of_network)
        lines += _ratios([ratio for ratio in ratios if ratio.network == name])
    return "\n".join(lines)


def _files(rows: Sequence[Row]) -> list[str]:
    first = rows[0]
    lines = [
        f"### {first.network}",
        "",
        f"{first.weights:,} weights; {first.calibration} inputs to calibrate, {first.tests} others "
        f"to test. Dense: {first.dense_score:.2f} {first.measure}.",
        "",
        f"| setting | target | bytes | predicted KL | held-out KL | test KL | {first.measure} |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for row in rows:
        numbers = (row.target_kl, row.predicted_kl, row.held_out_kl)
        target, predicted, held_out = ("" if math.isnan(n) else f"{n:.3g}" for n in numbers)
        lines.append(
            f"| {row.setting} | {target} | {row.bytes:,} | {predicted} | {held_out} "
            f"| {row.test_kl:.3g} ± {row.test_kl_error:.2g} | {row.score:.2f} |"
        )
    return [*lines, ""]


def _ratios(ratios: Sequence[Ratio]) -> list[str]:
    if not ratios:
        return []
    lines = ["| setting | at | bytes | over | its bytes | ratio | 95% upper |"]
    lines.append("|---|---|---:|---|---:|---:|---:|")
    for r in ratios:
        upper = "" if math.isnan(r.upper) else f"{r.upper:.3f}"
        lines.append(
            f"| {r.setting} | {r.at} | {r.bytes:,} | {r.other} | {r.other_bytes:,} "
            f"| {r.ratio:.3f} | {upper} |"
        )
    return [*lines, ""]


def main() -> None:
    path = FINDINGS / "checkpoints.md"
    before, rest = path.read_text().split(BEGIN)
    _, after = rest.split(END)
    tables = page(read(FINDINGS / "packed.csv", Row), read(FINDINGS / "packed_ratios.csv", Ratio))
    path.write_text(f"{before}{BEGIN}\n{tables}\n{END}{after}")


if __name__ == "__main__":
    main()
