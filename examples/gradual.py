"""Fine-tune the demo's ResNet while it stays pruned, and compare with one-shot pruning.

``python examples/gradual.py`` prunes each of the three trained networks to several sparsities, by
min-weight and in wavelet bases, in three ways: at once with the batch norms matched, at once with
training afterwards, and gradually during training. It writes
``docs/findings/gradual.csv`` and prints the table of it. It needs ``pip install 'wavprune[demo]'``.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator
from pathlib import Path

import click
import pandas as pd
import torch
from joblib import Parallel, delayed
from torch import nn

from wavprune import PruneConfig, Pruner, fast, match_batchnorm
from wavprune.common.atomic import replaced
from wavprune.demo import SEEDS, digits, resnet
from wavprune.demo.train import accuracy, shifted
from wavprune.training.schedules import Constant, Cubic, Schedule

TABLE = Path(__file__).parents[1] / "docs" / "findings" / "gradual.csv"
SPARSITIES = (0.8, 0.9, 0.95)
BASES = ("min-weight", "haar", "uhaar", "dct", "auto")
WAYS = ("at once", "at once, then trained", "gradually")
EPOCHS = 20
BATCH = 64
RATE = 0.02


@click.command()
@click.option(
    "--out",
    type=click.Path(dir_okay=False, path_type=Path),
    default=TABLE,
    help="The table. [default: docs/findings/gradual.csv]",
)
@click.option("--epochs", type=click.IntRange(min=2), default=EPOCHS, show_default=True)
@click.option("--jobs", type=click.IntRange(min=1), default=os.cpu_count(), show_default=True)
def main(out: Path, epochs: int, jobs: int) -> None:
    """Measure, and write the table."""
    runs = list(settings())
    work = Parallel(n_jobs=jobs, return_as="generator")(
        delayed(measure)(seed, basis, sparsity, way, epochs) for seed, basis, sparsity, way in runs
    )
    rows = [
        {"seed": seed, "basis": basis, "sparsity": sparsity, "way": way, "top1": top1}
        for (seed, basis, sparsity, way), top1 in zip(runs, work, strict=True)
    ]
    rows += [{"seed": seed, "way": "unpruned", "top1": accuracy(resnet(seed))} for seed in SEEDS]
    table = pd.DataFrame(rows)
    out.parent.mkdir(parents=True, exist_ok=True)
    with replaced(out) as temporary:
        table.to_csv(temporary, index=False, float_format="%.6g")
    means = table.pivot_table(index=["way", "basis"], columns="sparsity", values="top1", sort=False)
    click.echo(means.map("{:.2%}".format).to_string())


def settings() -> Iterator[tuple[int, str, float, str]]:
    """Seed, basis, sparsity and way of every run."""
    for seed in SEEDS:
        for sparsity in SPARSITIES:
            for way in WAYS:
                for basis in BASES:
                    yield seed, basis, sparsity, way


def measure(seed: int, basis: str, sparsity: float, way: str, epochs: int) -> float:
    """The accuracy of one pruned network on the test digits, from 0 to 1.

    Args:
        seed: the training of the network.
        basis: ``"min-weight"`` or a wavelet.
        sparsity: the sparsity at the end.
        way: one of ``WAYS``.
        epochs: passes over the training images.
    """
    torch.set_num_threads(1)
    network = resnet(seed)
    method, wavelet = ("min_weight", "uhaar") if basis == "min-weight" else ("dwt", basis)
    if way == "at once":
        unpruned = copy.deepcopy(network)
        fast.prune(network, method=method, wavelet=wavelet, sparsity=sparsity, scope="global")
        match_batchnorm(network, unpruned, digits("train", batch_size=2000))
        return accuracy(network)
    steps = epochs * -(-1197 // BATCH)
    schedule: Schedule = Constant(sparsity)
    if way == "gradually":
        # The last third of the steps lets the network recover from the last pruning.
        schedule = Cubic(0.0, sparsity, start=0, end=2 * steps // 3, every=max(steps // 30, 1))
    config = PruneConfig(method=method, wavelet=wavelet, sparsity=sparsity, scope="global")
    return accuracy(tuned(network, config, schedule, steps, seed))


def tuned(
    network: nn.Module, config: PruneConfig, schedule: Schedule, steps: int, seed: int
) -> nn.Module:
    """The network after some steps of SGD, pruned throughout."""
    images, labels = next(iter(digits("train", batch_size=10**6)))
    network.train()
    optimizer = torch.optim.SGD(network.parameters(), lr=RATE, momentum=0.9, weight_decay=5e-4)
    pruner = Pruner(network, config, schedule)
    pruner.attach(optimizer)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        while pruner.steps < steps:
            for batch in torch.split(torch.randperm(len(images)), BATCH):
                if pruner.steps == steps:
                    break
                optimizer.zero_grad()
                logits = network(shifted(images[batch]))
                torch.autograd.backward(nn.functional.cross_entropy(logits, labels[batch]))
                optimizer.step()
                decay.step()
    report = pruner.finish()
    assert config.sparsity is not None
    assert abs(report.sparsity - config.sparsity) < 0.01
    return network.eval()


if __name__ == "__main__":
    main()
