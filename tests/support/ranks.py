"""One rank of a training run; ``test_ranks.py`` starts two of them.

python tests/ranks.py {ddp,fsdp} RANK WORLD DIRECTORY
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.debug import CommDebugMode

from wavprune import PruneConfig, Pruner, prune_layers
from wavprune.engine.layers import select_layers
from wavprune.engine.sharding import first_channel, local_part
from wavprune.training.callbacks import check_whole
from wavprune.training.schedules import Cubic

CONFIGS = {
    "layer": PruneConfig(sparsity=0.7),
    "global": PruneConfig(wavelet="auto", sparsity=0.8, scope="global"),
    "percentile": PruneConfig(wavelet="haar", percentile=60),
    "min_weight": PruneConfig(method="min_weight", sparsity=0.6, scope="global"),
    "random": PruneConfig(method="random", sparsity=0.6, seed=5),
}


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 9, 3, padding=1),  # 5 and 4 output channels
        nn.ReLU(),
        nn.Conv2d(9, 16, 5, padding=2),
        nn.Conv2d(16, 1, 1),  # 1 and none
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(4, 4),
    )


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int, rank: int) -> None:
    generator = torch.Generator().manual_seed(rank)
    for _ in range(steps):
        x = torch.randn(4, 3, 8, 8, generator=generator)
        y = torch.randint(0, 4, (4,), generator=generator)
        optimizer.zero_grad()
        torch.autograd.backward(nn.functional.cross_entropy(model(x), y))
        optimizer.step()


def ddp(rank: int, directory: Path) -> None:
    model = network()
    wrapped = nn.parallel.DistributedDataParallel(model)
    pruner = Pruner(model, PruneConfig(scope="global"), Cubic(0.2, 0.8, 0, 4, 2))
    optimizer = torch.optim.SGD(wrapped.parameters(), lr=0.1, momentum=0.9)
    pruner.attach(optimizer)
    train(wrapped, optimizer, 6, rank)
    torch.save({"weights": model.state_dict(), "masks": pruner.masks}, directory / f"ddp-{rank}.pt")


def fsdp(rank: int, directory: Path) -> None:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    outcome = {}
    for name, config in CONFIGS.items():
        whole, model = network(), network()
        expected = prune_layers(select_layers(whole, config), config)
        fully_shard(model, mesh=mesh)
        layers = select_layers(model, config)
        assert all(isinstance(ref.weight, DTensor) for ref in layers)
        communication = CommDebugMode()  # type: ignore[no-untyped-call]  # torch has no types
        with communication:
            report = prune_layers(layers, config)
        counts = {str(op): n for op, n in communication.get_comm_counts().items()}
        for ref, right in zip(layers, select_layers(whole, config), strict=True):
            assert isinstance(ref.weight, DTensor)
            found = ref.weight.full_tensor()
            assert torch.allclose(found, right.weight, atol=1e-6), (name, ref.name)
        assert [layer.kept for layer in report] == [layer.kept for layer in expected], name
        assert [layer.shape for layer in report] == [layer.shape for layer in expected]
        for layer, other in zip(report, expected, strict=True):
            assert abs(layer.relative_error - other.relative_error) < 1e-6
            assert layer.wavelet == other.wavelet
        outcome[name] = {"sparsity": report.sparsity, "collectives": counts}
    model = network()
    fully_shard(model, mesh=mesh)
    pruner = Pruner(model, PruneConfig(sparsity=0.75))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    pruner.attach(optimizer)
    before = pruner.finish()
    pruner.attach(optimizer)
    train(model, optimizer, 3, rank)
    after = pruner.finish()
    assert [layer.kept for layer in after] == [layer.kept for layer in before]
    state = pruner.state_dict()
    states: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(states, state)
    pruner.load_state_dict(state)
    with pytest.raises(ValueError, match=r"layer '0': the state is of shape=.*, this pruner of"):
        pruner.load_state_dict(states[1 - rank])
    with pytest.raises(ValueError, match="is sharded, and this callback stores the masks of rank"):
        check_whole(model)
    fixed_masks(mesh)
    full = {name: value.full_tensor() for name, value in model.state_dict().items()}
    torch.save(full, directory / f"fsdp-{rank}.pt")
    if rank == 0:
        (directory / "fsdp.json").write_text(json.dumps(outcome))


def fixed_masks(mesh: DeviceMesh) -> None:
    """Masks that may not regrow: sharded as whole, in what is kept and what is reported."""
    outcomes = []
    for sharded in (False, True):
        model = network()
        if sharded:
            fully_shard(model, mesh=mesh)
        schedule = Cubic(0.5, 0.8, start=0, end=4, every=2)
        config = PruneConfig(wavelet="auto", scope="global")
        pruner = Pruner(model, config, schedule, regrow=False)
        pruner.attach(torch.optim.SGD(model.parameters()))
        for step in range(4):
            for number, parameter in enumerate(model.parameters()):
                generator = torch.Generator().manual_seed(100 * step + number)
                change = torch.randn(parameter.shape, generator=generator) * 0.01
                local = slice_like(parameter, change)
                with torch.no_grad():
                    local_part(parameter).add_(local)
            pruner.step()
        outcomes.append(pruner.finish())
    whole, parts = outcomes
    assert [layer.kept for layer in whole] == [layer.kept for layer in parts]
    for left, right in zip(whole, parts, strict=True):
        assert abs(left.relative_error - right.relative_error) < 1e-5


def slice_like(parameter: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    first = first_channel(parameter)
    return values[first : first + len(local_part(parameter))]


def main(kind: str, rank: int, world: int, directory: Path) -> None:
    torch.set_num_threads(1)
    meeting = f"file://{directory / 'store'}"
    dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=world)
    try:
        {"ddp": ddp, "fsdp": fsdp}[kind](rank, directory)
        dist.barrier()
    finally:
        dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4]))
