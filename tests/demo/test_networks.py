from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from sklearn.datasets import load_digits
from torch import nn

import wavprune
from wavprune import demo
from wavprune.demo import train

NETWORKS = [demo.resnet, demo.mlp]


def images_of(split: str) -> tuple[torch.Tensor, torch.Tensor]:
    images, labels = next(iter(demo.digits(split, batch_size=2000)))
    return images, labels


def test_the_splits_are_all_the_digits_once() -> None:
    parts = [images_of(split) for split in demo.SPLITS]
    images = torch.cat([images for images, _ in parts]).reshape(-1, 64)
    labels = torch.cat([labels for _, labels in parts])
    expected, answers = load_digits(return_X_y=True)
    found = torch.cat([images * 16, labels[:, None]], 1).numpy()
    wanted = np.concatenate([expected, answers[:, None]], 1)
    assert np.array_equal(found[np.lexsort(found.T)], wanted[np.lexsort(wanted.T)])
    assert images.dtype == torch.float32
    assert labels.dtype == torch.int64


def test_every_digit_has_the_same_share_in_both_splits() -> None:
    train_share, test_share = (
        torch.bincount(labels) / len(labels)
        for _, labels in (images_of(split) for split in demo.SPLITS)
    )
    assert torch.allclose(train_share, test_share, atol=2e-3)


def test_batches_are_of_the_size_asked_for_and_in_the_same_order_every_time() -> None:
    loader = demo.digits("test", batch_size=256)
    assert [len(labels) for _, labels in loader] == [256, 256, 88]
    again = torch.cat([labels for _, labels in loader])
    assert torch.equal(again, images_of("test")[1])


@pytest.mark.parametrize("seed", demo.SEEDS)
@pytest.mark.parametrize("network", NETWORKS)
def test_the_networks_read_digits_that_they_were_not_trained_on(network: type, seed: int) -> None:
    assert train.accuracy(network(seed)) > 0.97


@pytest.mark.parametrize("network", NETWORKS)
def test_the_trainings_differ(network: type) -> None:
    weights = [torch.cat([p.flatten() for p in network(seed).parameters()]) for seed in demo.SEEDS]
    assert not torch.allclose(weights[0], weights[1], atol=0.01)
    assert not torch.allclose(weights[1], weights[2], atol=0.01)


def test_all_weights_that_ship_are_smaller_than_a_mebibyte() -> None:
    files = list(Path(demo.__file__).parent.glob("*.safetensors"))
    assert len(files) == len(NETWORKS) * len(demo.SEEDS)
    assert sum(file.stat().st_size for file in files) < 2**20


@pytest.mark.parametrize("seed", [3, -1, "0", None])
def test_an_unknown_seed_is_said_with_those_that_exist(seed: int) -> None:
    with pytest.raises(ValueError, match=f"unknown seed {seed!r}; allowed: 0, 1, 2"):
        demo.resnet(seed)


def test_an_unknown_split_is_said_with_those_that_exist() -> None:
    with pytest.raises(ValueError, match="unknown split 'valid'; allowed: train, test"):
        demo.digits("valid")


def test_the_networks_can_be_pruned_and_trained() -> None:
    network = demo.resnet()
    report = wavprune.fast.prune(network, wavelet="uhaar", sparsity=0.5, scope="global")
    assert report.kept == report.numel // 2 == 38216
    assert report.weight_sparsity < 0.5
    images, labels = images_of("test")
    torch.autograd.backward(nn.functional.cross_entropy(network(images), labels))
    assert all(p.grad is not None and p.grad.any() for p in network.parameters())


def test_training_gives_the_same_weights_twice_and_leaves_the_random_state_alone() -> None:
    torch.manual_seed(7)
    state = torch.get_rng_state()
    first, second = (train.train(demo.MLP, seed=5, epochs=2) for _ in range(2))
    assert torch.equal(torch.get_rng_state(), state)
    other = train.train(demo.MLP, seed=6, epochs=2)
    for name, value in first.state_dict().items():
        assert torch.equal(value, second.state_dict()[name])
        assert not torch.equal(value, other.state_dict()[name])
    assert train.accuracy(first) > 0.5


def test_shifts_move_whole_images_by_a_pixel_at_most() -> None:
    image = torch.zeros(1, 1, 8, 8)
    image[..., 3, 4] = 1
    moved = train.shifted(image.expand(200, -1, -1, -1))
    places = {(int(y), int(x)) for _, _, y, x in moved.nonzero()}
    assert places == {(y, x) for y in (2, 3, 4) for x in (3, 4, 5)}
    assert bool((moved.sum((1, 2, 3)) == 1).all())


def test_a_stored_network_is_what_is_loaded(tmp_path: Path) -> None:
    network = train.train(demo.ResNet, seed=0, epochs=1)
    path = tmp_path / "net.safetensors"
    expected = train.stored(network, path).state_dict()
    fresh = demo.ResNet()
    fresh.load_state_dict(load_file(path))
    for name, value in fresh.state_dict().items():
        assert torch.equal(value, expected[name]), name
