from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, IterableDataset

from wavprune.common.loaders import batches, inputs_and_labels, inputs_of

X = torch.zeros(3, 2)


@pytest.mark.parametrize(
    "batch",
    [X, (X,), [X, torch.arange(3)], {"pixel_values": X, "labels": torch.arange(3)}],
)
def test_inputs_come_first_or_by_name(batch: object) -> None:
    assert inputs_of(batch) is X


@pytest.mark.parametrize(
    "batch",
    [
        (X, [0, 1, 2]),
        (X, np.arange(3)),
        (X, torch.arange(3, dtype=torch.uint8)),
        {"pixel_values": X, "label": [0, 1, 2]},
    ],
)
def test_labels_may_be_any_integers(batch: object) -> None:
    inputs, labels = inputs_and_labels(batch)
    assert inputs is X
    assert labels.dtype == torch.int64
    assert labels.tolist() == [0, 1, 2]


def test_a_loader_need_not_know_its_length(capsys: pytest.CaptureFixture[str]) -> None:
    class Stream(IterableDataset[torch.Tensor]):
        def __iter__(self) -> Iterator[torch.Tensor]:
            yield from X

        def __len__(self) -> int:
            raise TypeError("it is a stream")

    loader = DataLoader(Stream(), batch_size=2)
    assert [len(batch) for batch in batches(loader, True, "read")] == [2, 1]
    assert "read" in capsys.readouterr().err
