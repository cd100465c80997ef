from __future__ import annotations

import pytest
import torch

from wavprune.backends.eager import EagerBackend
from wavprune.backends.protocol import Batch, Target, resolve
from wavprune.bases.basis import basis_for
from wavprune.config import PruneConfig
from wavprune.engine.staging import Stage

# Not the device of a tensor made on "cpu": weights are copied there as they are to a GPU.
ELSEWHERE = torch.device("cpu", 0)
SHAPES = ((8, 4, 3, 3), (16, 8, 3, 3), (4, 4, 5, 5), (16, 16, 1, 1), (8, 8, 3, 3))


def batches() -> list[Batch]:
    generator = torch.Generator().manual_seed(0)
    weights = [torch.randn(shape, generator=generator) for shape in SHAPES]
    return [
        Batch(weight, basis_for(PruneConfig(), weight), True, torch.float32) for weight in weights
    ]


def bytes_of(members: list[Batch]) -> int:
    return sum(4 * batch.weight.numel() for batch in members)


def test_weights_that_compute_where_they_live_are_not_copied() -> None:
    members = batches()
    for device in (None, torch.device("cpu")):
        stage = Stage(members, device)
        assert not stage.copies
        assert not stage.scattered
        assert [batch.weight for batch in stage.everything] == [batch.weight for batch in members]


@pytest.mark.parametrize("room", [None, 10**9, 5000, 1])
def test_a_copied_model_is_pruned_as_it_would_be_in_place(room: int | None) -> None:
    backend = EagerBackend()
    expected, given = batches(), batches()
    keep = Target(keep=800)
    threshold = backend.threshold([(expected, keep)])
    rows = backend.apply_(expected, threshold.expand(len(expected)))
    stage = Stage(given, ELSEWHERE, room)
    assert stage.copies
    assert stage.scattered == (room is not None and room < bytes_of(given))
    assert torch.equal(backend.threshold([(stage.everything, keep)]), threshold)
    before = [batch.weight.clone() for batch in given]
    units = [[0, 1], [2], [3, 4]]
    found = []
    for unit, members in zip(units, stage.each(units), strict=True):
        found.append(backend.apply_(members, threshold.expand(len(unit))))
        assert all(torch.equal(given[i].weight, before[i]) for i in unit)
        stage.leave(unit, members)
    stage.finish()
    assert torch.equal(torch.cat(found), rows)
    for home, right in zip(given, expected, strict=True):
        assert torch.equal(home.weight, right.weight)


def test_only_what_fits_is_on_the_device_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    members = batches()
    stage = Stage(members, ELSEWHERE, room=9000)
    assert stage.largest_unit == 3000  # one arrives, one is pruned, one leaves
    copied: list[int] = []
    there = Stage._copied

    def counted(self: Stage, home: torch.Tensor) -> torch.Tensor:
        copied.append(home.numel())
        return there(self, home)

    monkeypatch.setattr(Stage, "_copied", counted)
    everything = stage.everything
    assert len(everything) == len(members)
    assert copied == []
    iterator = iter(everything)
    next(iterator)
    assert len(copied) == 2  # this one, and the next on its way
    assert len(list(iterator)) == len(members) - 1
    assert copied == [batch.weight.numel() for batch in members]


def test_stand_ins_tell_everything_but_values() -> None:
    for seen, batch in zip(Stage(batches(), ELSEWHERE).stand_ins, batches(), strict=True):
        assert seen.weight.shape == batch.weight.shape
        assert seen.weight.dtype == batch.weight.dtype
        assert seen.weight.untyped_storage().nbytes() == 4
        assert seen.kernels == batch.kernels


def test_one_threshold_for_what_is_never_together_needs_a_backend_that_can() -> None:
    assert resolve("auto", batches(), scattered=True).one_at_a_time
    assert resolve("eager", batches(), scattered=True).name == "eager"
    if not resolve("auto", batches()).one_at_a_time:
        with pytest.raises(ValueError, match="do not fit on one device together"):
            resolve("native", batches(), scattered=True)
