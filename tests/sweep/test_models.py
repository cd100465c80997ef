from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import TypeAdapter
from safetensors.torch import load_file, save_file
from torch import nn

from tests.support import sweeps
from wavprune import demo
from wavprune.sweep.models import identify, load_model, model_identity
from wavprune.sweep.sources import ModelSource

SOURCE: TypeAdapter[Any] = TypeAdapter(ModelSource)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return sweeps.folder(tmp_path_factory.mktemp("models"))


def loaded(root: Path, told: Any) -> nn.Module:
    return load_model(SOURCE.validate_python(told, context={"root": root}))


def directory(path: Path, weights: bool) -> Path:
    transformers = pytest.importorskip("transformers")
    config = transformers.ResNetConfig(
        embedding_size=4, hidden_sizes=[4, 8], depths=[1, 1], layer_type="basic", num_labels=4
    )
    if weights:
        transformers.ResNetForImageClassification(config).save_pretrained(path)
    else:
        config.architectures = ["ResNetForImageClassification"]
        config.save_pretrained(path)
    return path


def test_the_demo_networks_are_the_trained_ones(root: Path) -> None:
    for name, network in (("demo", demo.resnet(1)), ("demo-mlp", demo.mlp(1))):
        found = loaded(root, {"builtin": name, "seed": 1})
        assert model_identity(found) == model_identity(network)
        assert not found.training


def test_a_factory_gets_its_arguments_and_weights(root: Path) -> None:
    net = sweeps.Net(channels=5)
    save_file(net.state_dict(), root / "net.safetensors")
    told = {"factory": "module:Net", "arguments": {"channels": 5}, "weights": "net.safetensors"}
    assert SOURCE.validate_python(told, context={"root": root}).label == "net"
    found = loaded(root, told)
    torch.testing.assert_close(found.state_dict(), net.state_dict(), rtol=0, atol=0)


def test_random_weights_are_those_of_the_seed_and_leave_the_global_state_alone(root: Path) -> None:
    told = {"factory": "module:Net"}
    state = torch.random.get_rng_state()
    ids = [model_identity(loaded(root, {**told, "seed": seed})) for seed in (0, 0, 1)]
    assert ids[0] == ids[1] != ids[2]
    assert torch.equal(torch.random.get_rng_state(), state)


@pytest.mark.parametrize("weights", [True, False])
def test_a_hugging_face_directory_gives_the_same_network_each_time(
    tmp_path: Path, weights: bool
) -> None:
    path = directory(tmp_path / "net", weights)
    first, second = (loaded(tmp_path, {"directory": "net"}) for _ in range(2))
    assert model_identity(first) == model_identity(second)
    assert first(torch.zeros(1, 3, 32, 32)).logits.shape == (1, 4)
    assert weights == (path / "model.safetensors").exists()


def test_pickled_weights_are_refused(tmp_path: Path) -> None:
    path = directory(tmp_path / "net", weights=False)
    torch.save({}, path / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"pytorch_model\.bin and no safetensors file; allowed"):
        loaded(tmp_path, {"directory": "net"})


def renamed(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {f"module.{key}": value for key, value in state.items()}


def without(part: str) -> Any:
    return lambda state: {key: value for key, value in state.items() if part not in key}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            without("classifier"),
            r"2 of the network's tensors are not in it: 'classifier.1.bias'",
        ),
        (without("stages.1.layers.0.layer.0.convolution"), "1 of the network's tensors are not"),
        (renamed, r"tensors in it are not the network's: 'module\."),
        (lambda state: {**state, "extra": torch.zeros(1)}, "1 tensors in it are not .* 'extra'"),
        (lambda state: {**state, "classifier.1.bias": torch.zeros(9)}, "cannot be loaded: .*size"),
    ],
    ids=["no head", "no convolution", "other prefix", "more tensors", "other size"],
)
def test_a_hugging_face_directory_is_complete_or_refused(
    tmp_path: Path, change: Any, message: str
) -> None:
    path = directory(tmp_path / "net", weights=True) / "model.safetensors"
    save_file(change(load_file(path)), path, {"format": "pt"})
    with pytest.raises(ValueError, match=f"(?s){message}"):
        loaded(tmp_path, {"directory": "net"})


def test_a_counter_that_only_training_reads_may_be_missing(tmp_path: Path) -> None:
    path = directory(tmp_path / "net", weights=True) / "model.safetensors"
    expected = load_file(path)
    save_file(without("num_batches_tracked")(expected), path, {"format": "pt"})
    found = loaded(tmp_path, {"directory": "net"}).state_dict()
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_random_numbers_drawn_by_a_module_do_not_change_the_weights(tmp_path: Path) -> None:
    (tmp_path / "net.py").write_text(
        "import torch\ntorch.rand(7)\ndef make():\n    return torch.nn.Linear(3, 3)\n"
    )
    first, again = (loaded(tmp_path, {"factory": "net:make"}) for _ in range(2))
    assert model_identity(first) == model_identity(again)


def test_the_code_of_a_factory_is_part_of_what_a_model_is(tmp_path: Path) -> None:
    text = """
import torch
class Net(torch.nn.Module):
    def forward(self, x):
        return torch.relu(x)
"""
    told = SOURCE.validate_python({"factory": "net:Net"}, context={"root": tmp_path})
    ids = set()
    for activation in ("relu", "tanh", "relu"):
        (tmp_path / "net.py").write_text(text.replace("relu", activation))
        ids.add(identify(told, load_model(told)))
    assert len(ids) == 2


def test_addresses_are_not_part_of_a_structure() -> None:
    class Net(nn.Module):
        def extra_repr(self) -> str:
            return repr(lambda x: x)

    assert model_identity(Net()) == model_identity(Net())


@pytest.mark.parametrize(
    ("told", "message"),
    [
        ({"directory": "none"}, r"none holds no config\.json"),
        ({"factory": "missing_module:f"}, "cannot be imported: No module named 'missing_module'"),
        ({"factory": "module:missing"}, "cannot be imported: module 'module' has no attribute"),
        ({"factory": "module:BROKEN"}, "'module:BROKEN' is a str, not a function"),
        ({"factory": "module:loader"}, "returned a list, not a torch.nn.Module"),
        ({"factory": "module:Net", "weights": "none.st"}, r"none\.st cannot be loaded"),
        ({"factory": "module:Net", "weights": "data.npz"}, r"data\.npz cannot be loaded"),
        ({"factory": "module:Net", "weights": "other.safetensors"}, "Missing key"),
        ({"builtin": "demo", "seed": 99}, "unknown seed 99"),
    ],
)
def test_what_cannot_be_had_says_why(root: Path, told: Any, message: str) -> None:
    save_file({"other": torch.zeros(1)}, root / "other.safetensors")
    with pytest.raises((ValueError, TypeError), match=message):
        loaded(root, told)


def test_the_identity_sees_every_value_and_the_structure() -> None:
    net = sweeps.Net()
    before = model_identity(net)
    assert model_identity(nn.Sequential(net)) != before
    net.bn1.running_mean[0] += 1e-6  # type: ignore[index]  # it has one
    assert model_identity(net) != before
