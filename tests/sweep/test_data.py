from __future__ import annotations

import io
import shutil
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from pydantic import TypeAdapter

from tests.support import sweeps
from wavprune.errors import WavpruneError
from wavprune.sweep.data import data_identity, load_data
from wavprune.sweep.sources import DataSource

SOURCE: TypeAdapter[Any] = TypeAdapter(DataSource)
RED, GREY = (255, 0, 0), (102, 102, 102)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two classes of images: three red of 12x6 pixels, two grey of 8x8."""
    root = sweeps.folder(tmp_path_factory.mktemp("data"))
    for name, colour, size, count in (("a", RED, (12, 6), 3), ("b", GREY, (8, 8), 2)):
        (root / "images" / name / "more").mkdir(parents=True)
        for i in range(count):
            Image.new("RGB", size, colour).save(root / "images" / name / "more" / f"{i}.png")
        (root / "images" / name / "notes.txt").write_text("no image")
    return root


def source(root: Path, told: Any) -> Any:
    return SOURCE.validate_python(told, context={"root": root})


def loaded(root: Path, told: Any) -> tuple[torch.Tensor, torch.Tensor]:
    images, labels = zip(*load_data(source(root, told), 2), strict=True)
    return torch.cat(images), torch.cat(labels)


def test_a_folder_is_scaled_and_normalised(root: Path) -> None:
    told = {"images": "images", "size": [4, 5], "mean": [1, 0.4, 0.4], "std": [2, 1, 1]}
    images, labels = loaded(root, told)
    assert labels.tolist() == [0, 0, 0, 1, 1]
    assert images.shape == (5, 3, 4, 5)
    torch.testing.assert_close(images[0, :, 0, 0], torch.tensor([0, -0.4, -0.4]))
    torch.testing.assert_close(images[4, :, 3, 4], torch.tensor([-0.3, 0.0, 0.0]))


def test_a_folder_is_cut_out_of_the_centre(root: Path, tmp_path: Path) -> None:
    # The left half is black, the right half white: a centred cut sees both, a whole side neither.
    picture = np.zeros((10, 40), np.uint8)
    picture[:, 20:] = 255
    (tmp_path / "x").mkdir()
    Image.fromarray(picture).save(tmp_path / "x" / "0.png")
    told = {"images": str(tmp_path), "size": 8, "resize": 10, "channels": 1}
    images, _ = loaded(root, told)
    assert images.shape == (1, 1, 8, 8)
    assert images[0, 0, 3].tolist() == [0.0] * 4 + [1.0] * 4


def test_a_limit_is_spread_over_the_classes(root: Path) -> None:
    images, labels = loaded(root, {"images": "images", "size": 4, "limit": 3})
    assert len(images) == 3
    assert labels.tolist() == [0, 0, 1]
    assert loaded(root, {"npz": "data.npz", "limit": 16})[1].tolist() == [0] * 16


@pytest.mark.parametrize("dtype", [np.uint8, np.float64])
def test_arrays_are_divided_only_where_they_are_bytes(
    root: Path, tmp_path: Path, dtype: type[np.generic]
) -> None:
    images = np.arange(2 * 3 * 3).reshape(2, 3, 3).astype(dtype)
    np.savez(tmp_path / "x.npz", images=images, labels=np.array([1, 0], np.uint8))
    found, labels = loaded(tmp_path, {"npz": "x.npz", "mean": 1, "std": 2})
    expected = torch.from_numpy(images.astype(np.float32))[:, None]
    if dtype is np.uint8:
        expected = expected / 255
    torch.testing.assert_close(found, (expected - 1) / 2)
    assert labels.dtype == torch.int64
    assert labels.tolist() == [1, 0]


@pytest.mark.parametrize("factory", ["loader", "dataset"])
def test_a_factory_returns_a_loader_or_a_dataset(root: Path, factory: str) -> None:
    told = {"factory": f"module:{factory}", "arguments": {"samples": 8}}
    images, labels = loaded(root, told)
    assert images.shape == (8, 1, 8, 8)
    assert labels.tolist() == [0, 1, 2, 3] * 2


def test_the_demo_has_its_two_splits(root: Path) -> None:
    assert len(loaded(root, "demo")[0]) == 600
    assert len(loaded(root, {"builtin": "demo", "split": "train"})[0]) == 1197


@pytest.mark.parametrize(
    ("told", "message"),
    [
        ({"images": "none"}, "is not a folder; allowed: one with a subfolder for each class"),
        ({"images": "empty"}, "has no images in subfolders"),
        ({"images": "images", "mean": [0.5, 0.5]}, "mean has 2 values for images of 3 channels"),
        ({"npz": "none.npz"}, r"none\.npz does not exist; allowed: an \.npz file"),
        ({"npz": "module.py"}, r"module\.py cannot be read as an \.npz file"),
        ({"npz": "half.npz"}, "holds images; needed: images or inputs, and labels"),
        ({"npz": "odd.npz"}, r"images are \(4, 2\) and labels \(4,\); allowed: \(N, C, H, W\)"),
        ({"npz": "floats.npz"}, "labels are float64; allowed: integers"),
        ({"npz": "pickled.npz"}, "cannot be read as an .npz file: Object arrays cannot be loaded"),
        ({"npz": "data.npz", "std": [1, 2]}, "std has 2 values for images of 1 channels"),
        ({"factory": "module:Net"}, "returned a Net; allowed: a loader of batches, or a dataset"),
    ],
)
def test_what_cannot_be_had_says_why(root: Path, told: Any, message: str) -> None:
    four = np.zeros((4, 8, 8), np.float32)
    (root / "empty").mkdir(exist_ok=True)
    np.savez(root / "half.npz", images=four)
    np.savez(root / "odd.npz", images=four[:, 0, :2], labels=np.arange(4))
    np.savez(root / "floats.npz", images=four, labels=np.zeros(4))
    np.savez(root / "pickled.npz", images=np.array([{}], object), labels=np.arange(1))
    with pytest.raises((ValueError, TypeError), match=message):
        load_data(source(root, told), 2)


def test_an_image_that_is_none_says_which(root: Path, tmp_path: Path) -> None:
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "bad.png").write_text("no image")
    with pytest.raises(ValueError, match=r"bad\.png cannot be read as an image"):
        loaded(root, {"images": str(tmp_path)})


def test_the_identity_is_of_the_contents_and_their_preparation(root: Path, tmp_path: Path) -> None:
    shutil.copytree(root / "images", tmp_path / "copy")
    here = data_identity(source(root, {"images": "images"}))
    assert data_identity(source(tmp_path, {"images": "copy", "name": "other"})) == here
    assert data_identity(source(root, {"images": "images", "size": 32})) != here
    Image.new("RGB", (12, 6), GREY).save(tmp_path / "copy" / "a" / "more" / "0.png")
    assert data_identity(source(tmp_path, {"images": "copy"})) != here
    ids = {data_identity(source(root, {"npz": "data.npz", "limit": n})) for n in (None, 3, 4)}
    assert len(ids) == 3


def lying_npz(path: Path, shape: tuple[int, ...], name: str = "images") -> None:
    """A file whose header promises more than it holds."""
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        header, {"descr": "|u1", "fortran_order": False, "shape": shape}
    )
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(f"{name}.npy", header.getvalue() + bytes(100))
        labels = io.BytesIO()
        np.save(labels, np.zeros(1, np.int64))
        archive.writestr("labels.npy", labels.getvalue())


@pytest.mark.parametrize("name", ["images", "inputs"])
@pytest.mark.parametrize("shape", [(1 << 40, 1, 8, 8), (2, 1, 8, 8), (1 << 62,)])
def test_an_npz_whose_header_lies_is_one_error(
    tmp_path: Path, shape: tuple[int, ...], name: str
) -> None:
    lying_npz(tmp_path / "data.npz", shape, name)
    told = source(tmp_path, {"npz": "data.npz"})
    with pytest.raises(WavpruneError, match=rf"data.npz cannot be read .*{name}.npy says .* less"):
        load_data(told, 8)
