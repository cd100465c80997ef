from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import onnx
from wavprune.errors import WavpruneError
from wavprune.sweep.inputs import load_inputs

from ..support import graphs

pil = pytest.importorskip("PIL.Image")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two images."""
    found = tmp_path / "images"
    found.mkdir()
    for i in range(2):
        pil.new("RGB", (24, 20), (255, 0, 0)).save(found / f"{i}.png")
    return found


def graph(path: Path, kernel: tuple[int, ...], shape: tuple[Any, ...]) -> Path:
    """A graph of one convolution."""
    node = onnx.helper.make_node("Conv", ["x", "w"], ["y"])
    onnx.save(graphs.model_of([node], {"w": kernel}, shape), path)
    return path


@pytest.mark.parametrize(
    ("kernel", "shape", "expected"),
    [
        ((4, 3, 3, 3), ("N", 3, 8, 6), (2, 3, 8, 6)),
        ((4, 1, 3, 3), (1, 1, 8, 8), (2, 1, 8, 8)),
    ],
)
def test_a_graph_says_what_images_it_reads(
    folder: Path, kernel: Any, shape: Any, expected: Any
) -> None:
    model = graph(folder.parent / "net.onnx", kernel, shape)
    (batch,) = load_inputs(str(folder), model=model)
    assert batch.shape == expected
    (batch,) = load_inputs(str(folder), model=model, size=(5,))
    assert batch.shape == (2, expected[1], 5, 5)


@pytest.mark.parametrize(
    ("kernel", "shape", "message"),
    [
        ((4, 3, 3, 3), ("N", 3, "H", "W"), r"\(.*net\.onnx takes images of any size\); give their"),
        ((4, 2, 3, 3), ("N", 2, 8, 8), r"net\.onnx reads \?x2x8x8, no images .* give an \.npz"),
        ((4, 2, 3), ("N", 2, 9), r"net\.onnx reads \?x2x9, no images"),
    ],
)
def test_what_a_graph_leaves_open_is_named(
    folder: Path, kernel: Any, shape: Any, message: str
) -> None:
    model = graph(folder.parent / "net.onnx", kernel, shape)
    with pytest.raises(WavpruneError, match=message):
        load_inputs(str(folder), model=model)


def test_arrays_need_no_size(folder: Path) -> None:
    import numpy as np

    model = graph(folder.parent / "net.onnx", (4, 2, 3), ("N", 2, 9))
    values = torch.randn(6, 2, 9, generator=torch.Generator().manual_seed(0))
    np.savez(folder / "inputs.npz", inputs=values.numpy(), labels=np.arange(6))
    told = {"model": model, "mean": (1.0, 2.0), "std": (3.0, 4.0)}
    (batch,) = load_inputs(str(folder / "inputs.npz"), **told)  # type: ignore[arg-type]
    expected = (values - torch.tensor([[1.0], [2.0]])) / torch.tensor([[3.0], [4.0]])
    assert len(batch) == 1
    torch.testing.assert_close(batch[0], expected)
    (found,) = load_inputs(str(folder / "inputs.npz"), model=model, labels=True, limit=3)
    assert found[1].tolist() == [0, 2, 4]
    np.savez(folder / "images.npz", images=values.numpy())
    message = r"images\.npz gives inputs \(6, 1, 2, 9\), .*net\.onnx reads \?x2x9; allowed: inputs"
    with pytest.raises(WavpruneError, match=message):
        load_inputs(str(folder / "images.npz"), model=model)
    np.savez(folder / "both.npz", images=values.numpy(), inputs=values.numpy())
    with pytest.raises(WavpruneError, match="holds images, inputs; needed: images or inputs"):
        load_inputs(str(folder / "both.npz"), model=model)
    np.savez(folder / "flat.npz", inputs=np.zeros(9))
    with pytest.raises(WavpruneError, match=r"inputs are \(9,\); allowed: \(N, C, \.\.\.\)"):
        load_inputs(str(folder / "flat.npz"))
