"""The rows of ``calibrated.py`` as a page: targets, cost, and a table for each network."""

from __future__ import annotations

from collections.abc import Iterator

import pandas as pd

# What pruning from data does is changed now and then; rows say as of which change they are.
REVISION = 2
BEFORE = {
    2: """\
Rows marked * were measured before the last refit had a second attempt with larger batches and half
of its way among the candidates, and before the sequential pass looked at 96 positions of each of 64
inputs or more, in place of 32.
"""
}

HEAD = """\
# Pruning from a few inputs

Written by `python -m benchmarks.calibrated --page` from `calibrated.csv`: scope global, no labels,
the same kept counts within a sparsity. *magnitude* and the published methods (Wanda, SparseGPT,
OBC: layer by layer in the identity, at the counts that magnitude over all layers gives each) are
followed by `match_batchnorm` on the same inputs; *full* is `fast.prune(..., calibration=...)` as it
is by default. Of several trainings the mean; the standard error is that over the test inputs of one
training.

What was chosen on which images: ridges, probes and which candidate is taken are chosen in each run
from the calibration inputs alone. The length and the inputs of the last refit's steps, and how many
positions the sequential pass looks at, were chosen on ResNet-20 at 70, 80 and 90%, on calibration
images. The ridges for fewer than 64 inputs, the way in which ridges are tried and the shares of a
few inputs were chosen on the demo's ResNets and their test digits, and the last refit was tried on
some of them (95 to 99%, 50 inputs) before its final form, so the demo's rows are not those of an
untouched test.

`python -m benchmarks.calibrated NETWORK --data FOLDER` repeats the rows of a network (`--method`
names the published ones), with the packages that `benchmarks/calibrated_networks.py` lists. CPU
seconds are those of all threads, for `calibrate` and for pruning, on a machine that did other work
meanwhile, which makes them longer; the peak is that of the whole process, test images included.
"""
UNTOUCHED = "Nothing was chosen on images of the last network, which no other is pruned from."


def page(rows: pd.DataFrame) -> str:
    """The page of all rows."""
    rows = rows.assign(revision=_revisions(rows))
    oldest = int(rows["revision"].min())
    notes = [BEFORE[oldest + 1]] if oldest < REVISION else []
    if any("untouched" in name for name in rows["network"]):
        notes.append(f"{UNTOUCHED}\n")
    lines = ["\n".join([HEAD, *notes])]
    order = {name: index for index, name in enumerate(dict.fromkeys(rows["network"]))}
    last = [name for name in order if "untouched" in name]
    for name in [*(n for n in order if n not in last), *last]:
        for inputs, part in rows[rows["network"] == name].groupby("inputs", sort=False):
            lines += _network(f"{name}, {inputs} inputs", part)
    return "\n".join([*lines, *_costs(rows)]) + "\n"


def _network(title: str, rows: pd.DataFrame) -> Iterator[str]:
    logits = bool(rows["kl"].notna().any())
    trainings = rows["seed"].nunique()
    score = rows["measure"].iloc[0]
    yield from ("", f"## {title}", "")
    yield f"Unpruned: {rows['dense'].mean():.1f} {score}; {trainings} training(s)."
    more = ["agreement %", "KL"] if logits else []
    names = ["sparsity", "basis", "method", score, *more, "s", "chosen"]
    yield from ("", _line(names), "|---" * len(names) + "|")
    columns = [("score", 1), *([("agreement", 1), ("kl", 3)] if logits else [])]
    groups = rows.sort_values("sparsity", kind="stable")
    for key, runs in groups.groupby(["sparsity", "method", "basis"], sort=False):
        sparsity, method, basis = map(str, key)
        yield _line(
            [
                f"{100 * float(sparsity):g}%",
                basis,
                f"{method}*" if int(runs["revision"].min()) < REVISION else method,
                *(_with_error(runs, name, digits) for name, digits in columns),
                f"{runs['seconds'].mean():.0f}",
                runs["chosen"].fillna("").value_counts().index[0],
            ]
        )


def _revisions(rows: pd.DataFrame) -> pd.Series:
    """Since when each row is what it is; what takes no calibration data does not change."""
    found = rows["revision"] if "revision" in rows else pd.Series(float("nan"), rows.index)
    return found.fillna(1).where(rows["method"] == "full", REVISION).astype(int)


def _with_error(runs: pd.DataFrame, name: str, digits: int) -> str:
    return f"{runs[name].mean():.{digits}f} ± {runs[f'{name}_se'].mean():.{digits}f}"


def _costs(rows: pd.DataFrame) -> Iterator[str]:
    yield from (
        "",
        "## Cost of *full*",
        "",
        "| network | inputs | calibrate s | prune s | peak MB |",
    )
    yield "|---|---|---|---|---|"
    full = rows[rows["method"] == "full"]
    for key, runs in full.groupby(["network", "inputs"], sort=False):
        network, inputs = map(str, key)
        yield _line(
            [
                network,
                inputs,
                f"{runs['collect_seconds'].max():.0f}",
                f"{runs['seconds'].max():.0f}",
                f"{runs['peak_mb'].max():.0f}",
            ]
        )


def _line(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"
