"""Damaged compressed files under atheris: ``python tests/fuzz_checkpoint.py -runs=20000``.

Whatever the bytes are, loading gives a state dict or a ValueError. ``test_checkpoint_bad_files.py``
runs a bounded number of cases, by hypothesis, where atheris is not installed.
"""

from __future__ import annotations

import importlib
import sys
import tempfile
from pathlib import Path

import torch
from torch import nn

# No honest file of the seeds' size needs more.
MOST = 1 << 22


def seeds(directory: Path) -> list[bytes]:
    """A small file of each kind of content."""
    from wavprune import PruneConfig, checkpoint

    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 12, 1))
    kinds = (
        {"bits": 8},
        {"step": 3e-5, "coder": "zstd"},
        {"step": 1e-2},
        {"values": "float16", "config": PruneConfig(sparsity=0.7)},
        {"wavelet": "klt", "values": "float32"},
    )
    files = []
    for i, kind in enumerate(kinds):
        saved = checkpoint.save(net, directory / f"{i}.safetensors", **kind)  # type: ignore[arg-type]  # of several types
        files.append(saved.path.read_bytes())
    return files


def check(data: bytes, path: Path) -> None:
    """Load these bytes; anything but tensors or a ValueError that names the file is an error."""
    from wavprune import checkpoint

    path.write_bytes(data)
    try:
        state = checkpoint.load(path, max_bytes=MOST)
    except ValueError as error:
        if path.name not in str(error):
            raise AssertionError(f"the error does not name the file: {error}") from error
        return
    assert all(isinstance(tensor, torch.Tensor) for tensor in state.values())


def main() -> None:
    import atheris  # type: ignore[import-untyped,import-not-found,unused-ignore]  # optional

    # Atheris follows what is imported under its eyes, so nothing of it may be imported before.
    with atheris.instrument_imports(include=["wavprune.checkpoint"]):
        importlib.import_module("wavprune.checkpoint")
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        corpus = directory / "corpus"
        corpus.mkdir()
        for i, data in enumerate(seeds(directory)):
            (corpus / str(i)).write_bytes(data)
        atheris.Setup(
            [*sys.argv, str(corpus)], lambda data: check(data, directory / "x.safetensors")
        )
        atheris.Fuzz()


if __name__ == "__main__":
    main()
