from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from wavprune.backends import Budget, Job, Layer, names, resolve, unavailable
from wavprune.backends.masks import mask_bytes, pack, unpack
from wavprune.bases import basis_for
from wavprune.config import PruneConfig

PROJECTORS = [name for name in ("native", "eager", "ptwt", "reference") if name in names()]
BASES = [("uhaar", "periodization"), ("haar", "periodization"), ("db2", "symmetric")]


def layer_of(
    shape: tuple[int, int, int, int],
    dtype: torch.dtype = torch.float32,
    seed: int | None = None,
    **settings: Any,
) -> Layer:
    generator = torch.Generator().manual_seed(sum(shape))
    weight = torch.randn(shape, generator=generator).to(dtype)
    config = PruneConfig(**settings)
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    return Layer("conv", weight, basis_for(config, weight), True, compute, seed=seed)


@given(
    kernels=st.integers(0, 70),
    coefficients=st.integers(1, 20),
    flat=st.booleans(),
    seed=st.integers(0, 9),
)
def test_a_mask_gives_back_its_bits(kernels: int, coefficients: int, flat: bool, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    kept = torch.rand(kernels, coefficients, generator=generator) < 0.5
    mask = pack(kept, flat=flat)
    assert mask.shape == (mask_bytes(kernels, coefficients, flat=flat),)
    assert torch.equal(unpack(mask, kernels, coefficients, flat=flat), kept)


def test_the_bits_of_the_identity_are_in_the_order_of_the_values() -> None:
    kept = torch.zeros(4, 9, dtype=torch.bool)
    kept[0, 1] = kept[1, 0] = kept[3, 8] = True
    assert pack(kept, flat=True).tolist() == [2, 2, 0, 0, 8, 0]


def test_a_mask_of_another_weight_is_refused() -> None:
    with pytest.raises(ValueError, match=r"20 kernels of 9 .* must be 36 bytes.*not \(18,\)"):
        unpack(torch.zeros(18, dtype=torch.uint8), 20, 9, flat=False)


@pytest.mark.parametrize("backend", PROJECTORS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("settings", [{"wavelet": w, "mode": m} for w, m in BASES], ids=str)
@pytest.mark.parametrize("shape", [(5, 7, 3, 3), (300, 40, 3, 3), (6, 3, 5, 5), (33, 9, 1, 1)])
def test_a_mask_keeps_what_pruning_keeps(
    backend: str,
    dtype: torch.dtype,
    settings: dict[str, str],
    shape: tuple[int, int, int, int],
) -> None:
    layer = layer_of(shape, dtype, None, **settings)
    if backend in unavailable():
        pytest.skip(unavailable()[backend])
    try:
        chosen = resolve(backend, [layer], masks=True)
    except ValueError as error:
        pytest.skip(str(error))
    before = layer.weight.clone()
    threshold = chosen.threshold([Job((layer,), Budget(keep=layer.weight.numel() // 3))])
    (mask,) = chosen.masks([layer], threshold)
    assert torch.equal(layer.weight, before)
    kept = unpack(mask, layer.num_kernels, layer.num_coefficients, flat=layer.is_flat)
    twin = replace(layer, weight=before.clone())
    masked = replace(layer, weight=before.clone())
    chosen.project_([layer], [mask])
    row = chosen.apply_([twin], threshold)
    assert int(kept.sum()) == int(row[0, 0])
    assert torch.equal(layer.weight, twin.weight)
    # A mask in place of the threshold: the same weight, and the same said of it.
    by_mask = chosen.apply_([masked], [mask])
    assert torch.equal(masked.weight, twin.weight)
    assert by_mask[0, :2].tolist() == row[0, :2].tolist()
    assert torch.allclose(by_mask, row, rtol=1e-5)


@pytest.mark.parametrize("backend", ["native", "eager"])
def test_a_random_mask_keeps_what_random_pruning_keeps(backend: str) -> None:
    if backend in unavailable():
        pytest.skip(unavailable()[backend])
    layer = layer_of((60, 40, 3, 3), seed=12345, method="random")
    layer.weight[3] = 0
    twin = replace(layer, weight=layer.weight.clone())
    chosen = resolve(backend, [layer], masks=True)
    threshold = chosen.threshold([Job((layer,), Budget(keep=9000))])
    (mask,) = chosen.masks([layer], threshold)
    chosen.project_([layer], [mask])
    row = chosen.apply_([twin], threshold)
    assert int(row[0, 0]) == 9000
    assert (
        int(unpack(mask, layer.num_kernels, layer.num_coefficients, flat=layer.is_flat).sum())
        == 9000
    )
    assert torch.equal(layer.weight, twin.weight)


def test_every_backend_packs_the_same_bits_for_the_same_coefficients() -> None:
    masks = []
    for backend in ("native", "eager"):
        if backend in unavailable():
            pytest.skip(unavailable()[backend])
        layer = layer_of((37, 5, 3, 3), method="min_weight")
        chosen = resolve(backend, [layer], masks=True)
        threshold = chosen.threshold([Job((layer,), Budget(keep=500))])
        masks += chosen.masks([layer], threshold)
    assert torch.equal(masks[0], masks[1])


@pytest.mark.parametrize("shape", [(8, 4, 3, 3), (64, 64, 3, 3)])
def test_projecting_again_changes_nothing_more_than_rounding(
    shape: tuple[int, int, int, int],
) -> None:
    layer = layer_of(shape)
    chosen = resolve("auto", [layer], masks=True)
    threshold = chosen.threshold([Job((layer,), Budget(keep=layer.weight.numel() // 4))])
    masks = chosen.masks([layer], threshold)
    chosen.project_([layer], masks)
    once = layer.weight.clone()
    chosen.project_([layer], masks)
    assert torch.allclose(layer.weight, once, atol=1e-6)
