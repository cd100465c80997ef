from __future__ import annotations

import torch

from wavprune.checkpoint.making_up import made_up


def test_what_was_lost_is_made_up_for() -> None:
    generator = torch.Generator().manual_seed(0)
    read = torch.randn(2, 6, 4000, generator=generator, dtype=torch.float64)
    turned = torch.eye(6) + 0.2 * torch.randn(2, 6, 6, generator=generator, dtype=torch.float64)
    meant = turned @ read
    weight = torch.randn(2, 5, 6, generator=generator, dtype=torch.float64)
    change = made_up(weight, read, meant)
    lost = weight @ (meant - read)
    left = lost - change @ read
    assert float(left.norm()) < 0.02 * float(lost.norm())


def test_noise_of_a_few_inputs_changes_little() -> None:
    """What one half of the inputs says is no use for the other."""
    generator = torch.Generator().manual_seed(0)
    read = torch.randn(1, 40, 60, generator=generator, dtype=torch.float64)
    meant = read + torch.randn(1, 40, 60, generator=generator, dtype=torch.float64)
    weight = torch.randn(1, 5, 40, generator=generator, dtype=torch.float64)
    free = weight @ torch.linalg.lstsq(read[0].T, (meant - read)[0].T).solution.T
    change = made_up(weight, read, meant)
    assert float(change.norm()) < 0.2 * float(free.norm())
