"""Damaged compressed files under atheris: ``python tests/tools/fuzz_checkpoint.py -runs=20000``.

Whatever the bytes are, loading gives a state dict or a WavpruneError that names the file.
``tests/checkpoint/test_bad_files.py`` runs a bounded number of cases, by hypothesis too.
"""

from __future__ import annotations

import base64
import importlib
import sys
import tempfile
import zlib
from pathlib import Path

import torch
from torch import nn

# As a script it finds the rest of the tests.
sys.path.insert(0, str(Path(__file__).parents[2]))
from tests.support.version1 import FILES

# The seeds need less.
MAX_BYTES = 1 << 22


def seeds(directory: Path) -> list[bytes]:
    """A small file of each kind of content, and files of version 1 of the format."""
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
    version1 = [zlib.decompress(base64.b85decode(data)) for _, data in FILES.values()]
    return [*files, *version1]


def check(data: bytes, path: Path) -> None:
    """Load these bytes: anything but tensors or an error that names the file is a defect."""
    from wavprune import checkpoint
    from wavprune.errors import WavpruneError

    path.write_bytes(data)
    try:
        state = checkpoint.load(path, max_bytes=MAX_BYTES)
    except WavpruneError as error:
        if path.name not in str(error):
            raise AssertionError(f"the error does not name the file: {error}") from error
        return
    assert all(isinstance(tensor, torch.Tensor) for tensor in state.values())


def main() -> None:
    import atheris  # type: ignore[import-untyped,import-not-found,unused-ignore]  # optional

    # Atheris instruments modules as they are imported, so none of these may be imported before.
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
