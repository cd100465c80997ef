"""A file carries its bases, and needs nothing else to be decoded."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pywt
import torch
from torch import nn

from wavprune import PruneConfig, checkpoint
from wavprune.bases import named_basis
from wavprune.checkpoint.decoding import weight_checksum
from wavprune.checkpoint.selection import axis_functions
from wavprune.checkpoint.stored_basis import store


def metadata(path: Path) -> dict[str, Any]:
    data = path.read_bytes()
    (size,) = struct.unpack("<Q", data[:8])
    content: dict[str, Any] = json.loads(json.loads(data[8 : 8 + size])["__metadata__"]["wavprune"])
    return content


def rename_bases(path: Path) -> None:
    """Change the name of every basis to one that nobody knows."""
    data = path.read_bytes()
    (size,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + size])
    content = metadata(path)
    for basis in content["bases"]:
        basis[0] = "a basis of the future"
    header["__metadata__"]["wavprune"] = json.dumps(content)
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + size :])


@pytest.mark.parametrize("wavelet", ["haar", "uhaar", "dct", "klt", "db2"])
@pytest.mark.filterwarnings("ignore:'db2' on")
def test_a_file_needs_nothing_but_itself(
    tmp_path: Path, wavelet: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(4, 8, 3), nn.Conv2d(8, 8, (2, 7)), nn.Conv2d(8, 4, 5))
    path = tmp_path / "x.safetensors"
    saved = checkpoint.save(net, path, wavelet=wavelet)
    rename_bases(path)

    def fail(*_: Any, **__: Any) -> None:
        raise AssertionError("PyWavelets is asked")

    for function in ("wavedec2", "waverec2", "dwt", "idwt", "Wavelet", "dwt_max_level"):
        monkeypatch.setattr(pywt, function, fail)
    monkeypatch.setattr(np.linalg, "svd", fail)
    state = checkpoint.load(path)
    assert [layer.checksum for layer in saved.layers] == [
        weight_checksum(state[f"{layer.name}.weight"]) for layer in saved.layers
    ]


def test_a_basis_is_stored_once(tmp_path: Path) -> None:
    net = nn.Sequential(nn.Conv2d(4, 8, 3), nn.Conv2d(8, 8, 3), nn.Conv2d(8, 4, 5))
    path = tmp_path / "x.safetensors"
    checkpoint.save(net, path, wavelet="uhaar")
    content = metadata(path)
    assert [basis[1] for basis in content["bases"]] == [[3, 3], [5, 5]]
    sizes = [record[7][1] for record in content["layers"].values()]
    assert sizes == [36, 0, 100]
    # Each layer has its own principal components.
    checkpoint.save(net, path, wavelet="klt")
    assert len(metadata(path)["bases"]) == 3


@pytest.mark.parametrize("by_importance", [True, False])
@pytest.mark.parametrize("mode", ["periodization", "symmetric"])
@pytest.mark.parametrize("kernel", [(3, 3), (1, 9), (2, 7), (16, 16), (8, 31)])
@pytest.mark.parametrize("wavelet", ["haar", "uhaar", "dct", "db2", "bior2.2", "sym5"])
def test_functions_along_the_axes_give_the_matrix(
    wavelet: str, kernel: tuple[int, int], mode: str, by_importance: bool
) -> None:
    level = 2 if max(kernel) > 8 else 1
    basis = named_basis(wavelet, kernel, mode, level, min(kernel) > 1)
    operator = basis.importance_operator if by_importance else basis.coefficient_operator
    if operator.identity:
        return
    stored, data = store(wavelet, kernel, operator, axis_functions(basis), by_importance)
    assert len(data) == stored.size
    assert stored.size <= 4 * operator.synthesis.size
    if min(kernel) > 2:
        assert stored.functions is not None
    largest = np.abs(operator.synthesis).max()
    assert np.allclose(stored.matrix(data), operator.synthesis, rtol=0, atol=1e-6 * largest)


def test_long_axes_store_functions_not_matrices(tmp_path: Path) -> None:
    net = nn.Sequential(nn.Conv2d(1, 2, 32))
    saved = checkpoint.save(net, tmp_path / "x.safetensors", config=PruneConfig(wavelet="dct"))
    assert saved.bytes < 10_000
    state = checkpoint.load(saved.path)
    assert weight_checksum(state["0.weight"]) == saved.layers[0].checksum


def test_a_bomb_in_a_basis_does_not_go_off(tmp_path: Path) -> None:
    """A few bytes of metadata that ask for a matrix of gigabytes."""
    path = tmp_path / "x.safetensors"
    checkpoint.save(nn.Sequential(nn.Conv2d(1, 2, 3)), path, wavelet="uhaar", values="float16")
    data = path.read_bytes()
    (size,) = struct.unpack("<Q", data[:8])
    for coefficients in (1 << 20, 1 << 30, 1 << 60):
        header = json.loads(data[8 : 8 + size])
        content = json.loads(header["__metadata__"]["wavprune"])
        content["bases"][0][2:] = [coefficients, 1, [coefficients, 1], False, False]
        content["layers"]["0.weight"][6] = 0
        content["layers"]["0.weight"][7][1] = 4 * 3 * (coefficients + 1)
        header["__metadata__"]["wavprune"] = json.dumps(content)
        text = json.dumps(header).encode()
        path.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + size :])
        with pytest.raises(ValueError, match=r"is not one that this|takes .* bytes; allowed"):
            checkpoint.load(path)
