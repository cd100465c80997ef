from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from wavprune import PruneConfig
from wavprune.bases import basis_for

SCRIPT = Path(__file__).parents[1] / "support" / "ranks.py"
pytestmark = pytest.mark.skipif(
    not torch.distributed.is_available(), reason="this torch has no torch.distributed"
)


def run(kind: str, directory: Path) -> None:
    command = [sys.executable, str(SCRIPT), kind]
    ranks = [
        subprocess.Popen(
            [*command, str(rank), "2", str(directory)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    outputs = [rank.communicate(timeout=300)[0] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], "\n".join(outputs)


def test_ranks_of_ddp_hold_the_same_masks_and_weights(tmp_path: Path) -> None:
    run("ddp", tmp_path)
    first, second = (torch.load(tmp_path / f"ddp-{rank}.pt", weights_only=True) for rank in (0, 1))
    for part in ("weights", "masks"):
        assert first[part].keys() == second[part].keys()
        for name, value in first[part].items():
            assert torch.equal(value, second[part][name]), name
    bits = sum(int(np.unpackbits(mask.numpy()).sum()) for mask in first["masks"].values())
    numel = sum(w.numel() for name, w in first["weights"].items() if w.ndim == 4)
    assert bits == pytest.approx(0.2 * numel, abs=1)


def test_sharded_weights_get_the_threshold_of_whole_ones(tmp_path: Path) -> None:
    run("fsdp", tmp_path)
    outcome = json.loads((tmp_path / "fsdp.json").read_text())
    assert outcome["global"]["sparsity"] == pytest.approx(0.8, abs=0.001)
    for name, found in outcome.items():
        # Sums of counts alone: a gather would bring a whole weight to a rank.
        kinds = set(found["collectives"])
        assert kinds, name
        assert all("allreduce" in kind or "all_reduce" in kind for kind in kinds), (name, kinds)
    weights = [torch.load(tmp_path / f"fsdp-{rank}.pt", weights_only=True) for rank in (0, 1)]
    for name, value in weights[0].items():
        assert torch.equal(value, weights[1][name])
    config = PruneConfig()
    for name, keep in (("0.weight", 61), ("2.weight", 900), ("3.weight", 4)):
        weight = weights[0][name]
        kernels = weight.double().flatten(0, 1).flatten(1).numpy()
        sizes = np.abs(kernels @ basis_for(config, weight).analysis.T)
        assert np.count_nonzero(sizes > 1e-6 * sizes.max()) == keep
