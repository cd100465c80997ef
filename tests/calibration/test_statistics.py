from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import nn

from wavprune.calibration.calls import Call, Counting, Tap, Watched
from wavprune.calibration.patches import num_positions, patches
from wavprune.calibration.rows import Rows
from wavprune.calibration.statistics import (
    Accumulator,
    choose_blocks,
    generator_of,
    merged,
    sampled_positions,
)
from wavprune.errors import WavpruneError


class Catching(Tap):
    """Keeps the last call of each layer."""

    def __init__(self, weights: dict[str, torch.Tensor]) -> None:
        super().__init__(Watched(weights, {}))
        self.calls: dict[str, Call] = {}

    def layer(self, name: str, call: Call) -> torch.Tensor:
        self.calls[name] = call
        return call.run()


def call_of(module: nn.Module, x: torch.Tensor) -> tuple[Call, torch.Tensor]:
    weight = module.weight
    assert isinstance(weight, torch.Tensor)
    tap = Catching({"layer": weight})
    with torch.no_grad(), tap:
        out = module(x)
    return tap.calls["layer"], out


def outputs_by_patches(call: Call, positions: torch.Tensor | None = None) -> torch.Tensor:
    """``(groups, r, n)``: the weights as matrices times the patches."""
    rows = Rows(tuple(call.weight.shape), call.groups, call.transposed)
    return rows.of_weight(call.weight) @ patches(call, positions).double()


def as_columns(call: Call, out: torch.Tensor) -> torch.Tensor:
    """The outputs of the module in the order of ``outputs_by_patches``."""
    if not call.spatial:
        return out.reshape(1, -1, out.shape[-1]).mT.double()
    groups = call.groups
    return out.flatten(2).movedim(1, 0).reshape(groups, out.shape[1] // groups, -1).double()


CONVOLUTIONS = [
    {"kernel_size": kernel, "stride": stride, "padding": padding, "dilation": dilation}
    for kernel, stride, padding, dilation in itertools.product(
        (1, 3, (3, 2)), (1, 2), (0, 1, (1, 2)), (1, 2)
    )
]


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("settings", CONVOLUTIONS, ids=str)
def test_patches_times_weights_are_the_outputs(settings: dict[str, Any], groups: int) -> None:
    module = nn.Conv2d(4, 8, groups=groups, **settings)
    call, out = call_of(module, torch.randn(3, 4, 9, 8))
    bias = module.bias
    assert bias is not None
    expected = as_columns(call, out - bias[:, None, None])
    torch.testing.assert_close(outputs_by_patches(call), expected, rtol=1e-5, atol=1e-5)
    assert num_positions(call) == out[0, 0].numel()


@pytest.mark.filterwarnings("ignore:Using padding='same'")
@pytest.mark.parametrize("mode", ["zeros", "reflect", "replicate", "circular"])
@pytest.mark.parametrize("padding", [2, "same", "valid"])
def test_padding_in_every_mode_is_seen(mode: Any, padding: int | str) -> None:
    module = nn.Conv2d(2, 4, (3, 4), padding=padding, padding_mode=mode, bias=False)
    with torch.no_grad():
        call, out = call_of(module, torch.randn(2, 2, 7, 7))
    torch.testing.assert_close(
        outputs_by_patches(call), as_columns(call, out), rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize(
    ("module", "shape"),
    [
        (nn.Conv1d(4, 6, 5, stride=2, padding=2, dilation=2, groups=2, bias=False), (2, 4, 17)),
        (nn.Conv3d(2, 3, (3, 1, 2), stride=(1, 2, 1), padding=1, bias=False), (2, 2, 5, 4, 6)),
        (nn.Conv2d(6, 6, 5, padding=2, groups=6, bias=False), (2, 6, 8, 8)),
        (nn.Linear(7, 5, bias=False), (3, 7)),
        (nn.Linear(7, 5, bias=False), (2, 4, 3, 7)),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else str(value),
)
def test_other_layers(module: nn.Module, shape: tuple[int, ...]) -> None:
    call, out = call_of(module, torch.randn(shape))
    torch.testing.assert_close(
        outputs_by_patches(call), as_columns(call, out), rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize(
    "settings",
    [
        {"kernel_size": 3},
        {"kernel_size": 4, "stride": 2, "padding": 1},
        {"kernel_size": 3, "stride": 2, "padding": 1, "output_padding": 1},
        {"kernel_size": 3, "stride": 2, "padding": 3, "dilation": 2, "output_padding": 1},
        {"kernel_size": (2, 5), "stride": (3, 1), "padding": (0, 2)},
        {"kernel_size": 1, "padding": 1},
    ],
    ids=str,
)
def test_transposed_convolutions(settings: dict[str, Any], groups: int) -> None:
    module = nn.ConvTranspose2d(4, 6, groups=groups, bias=False, **settings)
    call, out = call_of(module, torch.randn(2, 4, 6, 7))
    torch.testing.assert_close(
        outputs_by_patches(call), as_columns(call, out), rtol=1e-5, atol=1e-5
    )
    assert num_positions(call) == out[0, 0].numel()


@pytest.mark.parametrize("kind", [nn.ConvTranspose1d, nn.ConvTranspose3d])
def test_transposed_convolutions_of_other_dimensions(kind: type[nn.Module]) -> None:
    module = kind(3, 2, 3, stride=2, padding=1, bias=False)
    spatial = 1 if kind is nn.ConvTranspose1d else 3
    call, out = call_of(module, torch.randn(2, 3, *(4,) * spatial))
    torch.testing.assert_close(
        outputs_by_patches(call), as_columns(call, out), rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize(
    "module",
    [
        nn.Conv2d(4, 6, 3, stride=2, padding=1, groups=2, bias=False),
        nn.ConvTranspose2d(4, 6, 3, stride=2, groups=2, bias=False),
        nn.Linear(7, 3, bias=False),
    ],
    ids=lambda module: type(module).__name__,
)
def test_sampled_positions_are_columns_of_all(module: nn.Module) -> None:
    call, _ = call_of(module, torch.randn(3, 4, 7, 7))
    count = num_positions(call)
    positions = torch.tensor([0, 2, count - 1])
    whole = patches(call)
    whole = whole.view(*whole.shape[:-1], 3, count)
    chosen = patches(call, positions)
    chosen = chosen.view(*chosen.shape[:-1], 3, 3)
    torch.testing.assert_close(chosen, whole[..., positions])


def test_a_module_that_pads_in_its_own_forward_is_seen_padded() -> None:
    class Padding(nn.Conv2d):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(nn.functional.pad(x, (0, 1, 0, 1), value=5.0))

    module = Padding(2, 3, 2, bias=False)
    call, out = call_of(module, torch.randn(2, 2, 4, 4))
    torch.testing.assert_close(
        outputs_by_patches(call), as_columns(call, out), rtol=1e-5, atol=1e-5
    )


def test_the_moments_are_those_of_an_im2col_by_hand() -> None:
    x = torch.randn(2, 4, 6, 5)
    module = nn.Conv2d(4, 4, (3, 2), stride=(2, 1), padding=(1, 0), groups=2)
    call, _ = call_of(module, x)
    sums = Accumulator()
    sums.add(patches(call))
    padded = nn.functional.pad(x, (0, 0, 1, 1)).double()
    for group in range(2):
        columns = torch.stack(
            [
                padded[n, 2 * group : 2 * group + 2, 2 * i : 2 * i + 3, j : j + 2].flatten()
                for n in range(2)
                for i in range(3)
                for j in range(4)
            ]
        )
        found = sums.statistics()
        assert found.patches == len(columns)
        torch.testing.assert_close(found.mean[group], columns.mean(0), rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(
            found.covariance[group], columns.T.cov(correction=0), rtol=1e-5, atol=1e-6
        )
        torch.testing.assert_close(
            found.second_moment(False)[group],
            columns.T @ columns / len(columns),
            rtol=1e-5,
            atol=1e-6,
        )


def test_half_precision_and_channels_last_are_summed_in_float32() -> None:
    module = nn.Conv2d(3, 4, 3, padding=1).half()
    x = torch.randn(2, 3, 6, 6).half().to(memory_format=torch.channels_last)
    call = Call(nn.functional.conv2d, x, module.weight, None, {"padding": 1}, 2)
    wide = Call(nn.functional.conv2d, x.float(), module.weight, None, {"padding": 1}, 2)
    assert patches(call).dtype == torch.float32
    torch.testing.assert_close(patches(call), patches(wide), rtol=0, atol=0)


def test_blocks_are_the_diagonal_of_the_whole() -> None:
    u = torch.randn(2, 12, 50)
    whole, parts = Accumulator(), Accumulator(3)
    whole.add(u)
    parts.add(u)
    covariance = whole.statistics().covariance
    blocks = parts.statistics().covariance.view(2, 3, 4, 4)
    for block in range(3):
        part = slice(4 * block, 4 * block + 4)
        # Products are summed in float32, in an order of its own for each shape.
        torch.testing.assert_close(
            blocks[:, block], covariance[:, part, part], rtol=1e-5, atol=1e-6
        )


def test_the_largest_layer_is_cut_until_all_fit() -> None:
    rows = {"small": Rows((8, 4, 3, 3)), "large": Rows((8, 64, 3, 3))}
    assert choose_blocks(rows, 1 << 30, 1) == {"small": 1, "large": 1}
    cut = choose_blocks(rows, 8 * (36**2 + 576**2 // 4), 1)
    assert cut == {"small": 1, "large": 4}
    assert choose_blocks({"wide": Rows((8, 512, 3, 3))}, 1 << 40, 1) == {"wide": 4}
    with pytest.raises(WavpruneError, match="max_memory=1000: the second moments of 2 layers"):
        choose_blocks(rows, 1000, 1)


def test_statistics_of_parts_merge_into_those_of_all() -> None:
    u = torch.randn(1, 5, 70).double() * 3 + 1
    whole, first, second = Accumulator(), Accumulator(), Accumulator()
    whole.add(u)
    first.add(u[..., :20])
    second.add(u[..., 20:])
    together = merged([first.statistics(), second.statistics()])
    torch.testing.assert_close(together.mean, whole.statistics().mean)
    torch.testing.assert_close(together.covariance, whole.statistics().covariance)


def test_positions_are_drawn_from_seed_and_name_alone() -> None:
    cpu = torch.device("cpu")
    first = sampled_positions(100, 10, generator_of(3, "a"), cpu)
    torch.manual_seed(5)
    again = sampled_positions(100, 10, generator_of(3, "a"), cpu)
    other = sampled_positions(100, 10, generator_of(3, "b"), cpu)
    assert first is not None
    assert again is not None
    assert other is not None
    assert first.tolist() == again.tolist() == sorted(set(first.tolist()))
    assert first.tolist() != other.tolist()
    assert sampled_positions(10, 10, generator_of(3, "a"), cpu) is None


def test_the_work_of_a_network_is_that_of_all_its_layers() -> None:
    layers = (
        nn.Conv2d(4, 6, 3, stride=2, groups=2),
        nn.ConvTranspose2d(6, 5, 2, stride=2),
        nn.Flatten(),
        nn.Linear(5 * 8 * 8, 10),
    )
    count = Counting()
    with torch.no_grad(), count:
        nn.Sequential(*layers)(torch.zeros(1, 4, 9, 9))
    convolution, transposed, linear = 6 * 4 * 4 * 2 * 9, 6 * 4 * 4 * 5 * 4, 320 * 10
    assert count.multiplications == convolution + transposed + linear
    assert count.outputs == 6 * 4 * 4 + 5 * 8 * 8 + 10
