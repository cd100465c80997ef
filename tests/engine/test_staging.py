from __future__ import annotations

import pytest
import torch

from wavprune.backends import Budget, Job, Layer, resolve
from wavprune.backends.eager import EagerBackend
from wavprune.bases import basis_for
from wavprune.config import PruneConfig
from wavprune.engine.staging import Stage

# Not the device of a tensor made on "cpu": weights are copied there as they are to a GPU.
ELSEWHERE = torch.device("cpu", 0)
SHAPES = ((8, 4, 3, 3), (16, 8, 3, 3), (4, 4, 5, 5), (16, 16, 1, 1), (8, 8, 3, 3))


def layers() -> list[Layer]:
    generator = torch.Generator().manual_seed(0)
    weights = [torch.randn(shape, generator=generator) for shape in SHAPES]
    return [
        Layer(f"conv{i}", weight, basis_for(PruneConfig(), weight))
        for i, weight in enumerate(weights)
    ]


def bytes_of(members: list[Layer]) -> int:
    return sum(4 * layer.weight.numel() for layer in members)


def test_weights_that_compute_where_they_live_are_not_copied() -> None:
    members = layers()
    for device in (None, torch.device("cpu")):
        stage = Stage(members, device)
        assert not stage.copies
        assert not stage.scattered
        assert [layer.weight for layer in stage.job(Budget()).layers] == [
            layer.weight for layer in members
        ]


@pytest.mark.parametrize("room", [None, 10**9, 5000, 1])
def test_a_copied_model_is_pruned_as_it_would_be_in_place(room: int | None) -> None:
    backend = EagerBackend()
    expected, given = layers(), layers()
    keep = Budget(keep=800)
    threshold = backend.threshold([Job(expected, keep)])
    rows = backend.apply_(expected, threshold.expand(len(expected)))
    stage = Stage(given, ELSEWHERE, room)
    assert stage.copies
    assert stage.scattered == (room is not None and room < bytes_of(given))
    assert torch.equal(backend.threshold([stage.job(keep)]), threshold)
    before = [layer.weight.clone() for layer in given]
    calls = [[0, 1], [2], [3, 4]]
    results = []
    for call, members in zip(calls, stage.visit(calls), strict=True):
        results.append(backend.apply_(members, threshold.expand(len(call))))
        assert all(torch.equal(given[i].weight, before[i]) for i in call)
        stage.leave(members)
    stage.finish()
    assert torch.equal(torch.cat(results), rows)
    for home, right in zip(given, expected, strict=True):
        assert torch.equal(home.weight, right.weight)


def test_only_what_fits_is_on_the_device_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    members = layers()
    stage = Stage(members, ELSEWHERE, room=9000)
    assert stage.bytes_per_call == 3000  # one arrives, one is pruned, one leaves
    copied: list[int] = []
    there = Stage._copied

    def counted(self: Stage, home: torch.Tensor) -> torch.Tensor:
        copied.append(home.numel())
        return there(self, home)

    monkeypatch.setattr(Stage, "_copied", counted)
    job = stage.job(Budget(keep=1))
    assert len(job.layers) == len(members)
    assert copied == []
    iterator = job.visit()
    next(iterator)
    assert len(copied) == 2  # this one, and the next on its way
    assert len(list(iterator)) == len(members) - 1
    assert copied == [layer.weight.numel() for layer in members]


def test_layers_still_to_be_copied_tell_everything_but_values() -> None:
    for seen, layer in zip(Stage(layers(), ELSEWHERE).layers, layers(), strict=True):
        assert seen.weight.is_meta
        assert seen.weight.shape == layer.weight.shape
        assert seen.weight.stride() == layer.weight.stride()
        assert seen.weight.dtype == layer.weight.dtype
        assert seen.device == ELSEWHERE
        assert seen.num_kernels == layer.num_kernels


def test_one_threshold_for_what_is_never_together_needs_a_backend_that_can() -> None:
    assert resolve("auto", layers(), scattered=True).can_stream
    assert resolve("eager", layers(), scattered=True).name == "eager"
    if not resolve("auto", layers()).can_stream:
        with pytest.raises(ValueError, match="do not fit on one device together"):
            resolve("native", layers(), scattered=True)
