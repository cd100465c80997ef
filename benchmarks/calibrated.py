"""Measure what a few unlabelled inputs change: pruning from calibration data beside magnitude.

``python -m benchmarks.calibrated demo`` prunes the ResNets that come with the package; the other
networks need ``--data FOLDER``, see ``calibrated_networks.py``. Each row is appended to
``--output``, a CSV file, when it is measured; rows that are there are not measured again. Scores,
agreement and KL are means over the test inputs with their standard errors. Kept counts are equal
within a sparsity. Methods are ``magnitude``, a level of calibration, or one of ``peers.py``; all
but the levels are followed by ``match_batchnorm`` on the same inputs. With ``--page FILE`` the rows
of ``--output`` are written as a page of Markdown, too.
"""

from __future__ import annotations

import copy
import dataclasses
import resource
import time
from pathlib import Path
from typing import Any

import click
import pandas as pd
import torch
from torch import nn
from torch.nn import functional

import wavprune
from wavprune.report import PruneReport

from .calibrated_networks import NETWORKS, Task
from .calibrated_page import REVISION, page
from .peers import PEERS, prune_layers

KEY = ("network", "seed", "inputs", "basis", "method", "sparsity")
SHOWN = (*KEY, "score", "kl", "seconds", "peak_mb", "chosen")


class Table:
    """The rows of a CSV file; each is written as soon as it is known."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._rows: list[dict[Any, Any]] = []
        if path.exists():
            self._rows = pd.read_csv(path).to_dict("records")

    def has(self, key: dict[str, Any]) -> bool:
        """Whether there is a row with this key."""
        return any(all(row[name] == key[name] for name in KEY) for row in self._rows)

    def add(self, row: dict[str, Any]) -> None:
        """Write one more row."""
        self._rows.append(row)
        pd.DataFrame(self._rows).to_csv(self._path, index=False)
        click.echo(", ".join(f"{name} {row[name]}" for name in SHOWN))


class Measured:
    """One network, its calibration and its outputs, each made when it is needed."""

    def __init__(self, task: Task) -> None:
        self.task = task
        self.batches = list(torch.split(task.calibration, task.batch))
        self._dense: torch.Tensor | None = None
        self._calibration: wavprune.Calibration | None = None
        self.collected = 0.0

    @property
    def calibration(self) -> wavprune.Calibration:
        """Collected once."""
        if self._calibration is None:
            start = time.process_time()
            self._calibration = wavprune.calibrate(
                self.task.model, self.batches, targets=self.task.targets
            )
            self.collected = time.process_time() - start
        return self._calibration

    def measures(self, model: nn.Module) -> dict[str, float]:
        """Means over the test inputs, and their standard errors."""
        if self._dense is None:
            self._dense = outputs_of(self.task.model, self.task.test, self.task.batch)
        outputs, dense = outputs_of(model, self.task.test, self.task.batch), self._dense
        values = {"score": self.task.score(outputs)}
        if self.task.logits:
            log_q, log_p = outputs.double().log_softmax(1), dense.double().log_softmax(1)
            values["agreement"] = 100 * (outputs.argmax(1) == dense.argmax(1)).double()
            kl = functional.kl_div(log_q, log_p, reduction="none", log_target=True)
            values["kl"] = kl.sum(1)
        row = {"agreement": float("nan"), "kl": float("nan")}
        for name, each in values.items():
            row[name] = round(float(each.mean()), 4)
            row[f"{name}_se"] = round(float(each.std()) / len(each) ** 0.5, 4)
        row["dense"] = round(float(self.task.score(dense).mean()), 4)
        return row

    def pruned(self, method: str, settings: dict[str, Any]) -> tuple[nn.Module, PruneReport]:
        """A copy that is pruned, and its report; that of magnitude where a peer keeps as much."""
        task = self.task
        model = copy.deepcopy(task.model)
        if method in PEERS:
            report = wavprune.fast.prune(copy.deepcopy(model), **settings)
            prune_layers(method, model, self.calibration, report)
            wavprune.match_batchnorm(model, task.model, self.batches)
        elif method == "magnitude":
            report = wavprune.fast.prune(model, **settings)
            wavprune.match_batchnorm(model, task.model, self.batches)
        else:
            report = wavprune.fast.prune(
                model, calibration=self.calibration, calibration_level=method, **settings
            )
        return model, report


@torch.no_grad()
def outputs_of(model: nn.Module, x: torch.Tensor, size: int) -> torch.Tensor:
    """Of all inputs, in batches."""
    return torch.cat([model(batch) for batch in torch.split(x, size)])


def measure(task: Task, bases: list[str], methods: list[str], table: Table) -> None:
    """Every method in every basis at every sparsity."""
    measured = Measured(task)
    for sparsity in task.sparsities:
        for method in methods:
            # The papers know no other basis.
            for basis in ["identity"] if method in PEERS else bases:
                key = {
                    "network": task.name,
                    "seed": task.seed,
                    "inputs": len(task.calibration),
                    "basis": basis,
                    "method": method,
                    "sparsity": sparsity,
                }
                if table.has(key):
                    continue
                if method != "magnitude":
                    _ = measured.calibration
                settings = {
                    "wavelet": basis,
                    "sparsity": sparsity,
                    "scope": "global",
                    "targets": task.targets,
                }
                start = time.process_time()
                model, report = measured.pruned(method, settings)
                spent = time.process_time() - start
                chosen = "" if report.decision is None else report.decision.chosen
                table.add(
                    {
                        **key,
                        "measure": task.measure,
                        "kept": report.kept,
                        **measured.measures(model),
                        "seconds": round(spent, 1),
                        "collect_seconds": round(measured.collected, 1),
                        "threads": torch.get_num_threads(),
                        "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
                        "chosen": chosen,
                        "revision": REVISION,
                    }
                )


@click.command()
@click.argument("networks", nargs=-1, type=click.Choice(sorted(NETWORKS)))
@click.option(
    "--data",
    type=click.Path(path_type=Path, exists=True),
    default=Path(),
    help="Folder with the data.",
)
@click.option(
    "--output",
    type=click.Path(path_type=Path),
    default=Path("out/calibrated.csv"),
    show_default=True,
    help="CSV file of the results.",
)
@click.option("--basis", "bases", multiple=True, default=["dct"], show_default=True)
@click.option(
    "--method", "methods", multiple=True, default=["magnitude", "full"], show_default=True
)
@click.option("--sparsity", "sparsities", multiple=True, type=float, help="In place of its own.")
@click.option("--page", "page_path", type=click.Path(path_type=Path), help="Markdown to write.")
@click.option("--threads", default=2, show_default=True)
def main(
    networks: tuple[str, ...],
    data: Path,
    output: Path,
    bases: tuple[str, ...],
    methods: tuple[str, ...],
    sparsities: tuple[float, ...],
    page_path: Path | None,
    threads: int,
) -> None:
    """Measure networks; seconds are those of the CPU, of all threads together."""
    torch.set_num_threads(threads)
    output.parent.mkdir(parents=True, exist_ok=True)
    table = Table(output)
    for network in networks:
        for task in NETWORKS[network](data):
            chosen = dataclasses.replace(task, sparsities=sparsities or task.sparsities)
            measure(chosen, list(bases), list(methods), table)
    if page_path is not None:
        page_path.write_text(page(pd.read_csv(output)), encoding="utf-8")


if __name__ == "__main__":
    main()
