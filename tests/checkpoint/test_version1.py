"""Files of version 1 of the format, which name their bases, are read to the same bits."""

from __future__ import annotations

import base64
import json
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.version1 import FILES
from wavprune import checkpoint
from wavprune.checkpoint.version1 import FIELDS


def content(kind: str) -> bytes:
    return zlib.decompress(base64.b85decode(FILES[kind][1]))


def crc(tensor: torch.Tensor) -> int:
    return zlib.crc32(tensor.contiguous().view(torch.uint8).numpy().tobytes())


@pytest.mark.parametrize("kind", FILES)
def test_a_file_of_version_1_decodes_to_the_same_bits(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(content(kind))
    state = checkpoint.load(path)
    assert {name: crc(tensor) for name, tensor in state.items()} == FILES[kind][0]
    checkpoint.decompress(path, tmp_path / "y.safetensors")


def change_record(data: bytes, change: Callable[[dict[str, Any]], object]) -> bytes:
    (size,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + size])
    metadata = json.loads(header["__metadata__"]["wavprune"])
    record = dict(zip(FIELDS, metadata["layers"]["0.weight"], strict=True))
    change(record)
    metadata["layers"]["0.weight"] = list(record.values())
    header["__metadata__"]["wavprune"] = json.dumps(metadata)
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data[8 + size :]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda r: r.update(basis=["dct", [3, 3], None, None, False, True]), "not, to the last"),
        (lambda r: r.update(basis=["db99", [3, 3], None, None, False, True]), "says basis="),
        (lambda r: r.update(basis=["dct", [999, 999], None, None, False, True]), "says basis="),
        (lambda r: r.update(basis=[[], [3, 3], None, None, False, True]), "says basis="),
        (lambda r: r.update(basis=["db38", [3, 3], "zero", 40, True, True]), "says basis="),
        (lambda r: r.update(M=10), "'0.weight': "),
        (lambda r: r.update(M=1 << 40), "record says M="),
        (lambda r: r.update(matrix_crc=1), "not, to the last bit"),
    ],
)
def test_a_basis_that_cannot_be_is_refused(
    tmp_path: Path, change: Callable[[dict[str, Any]], object], message: str
) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(change_record(content("uhaar, pruned, step"), change))
    with pytest.raises(ValueError, match=message) as caught:
        checkpoint.load(path)
    assert str(path) in str(caught.value)


def test_a_long_wavelet_on_a_large_kernel_costs_nothing(tmp_path: Path) -> None:
    """A record of a few bytes names a matrix of 10 GB, which must not be made."""
    path = tmp_path / "x.safetensors"

    def change(record: dict[str, Any]) -> None:
        basis = ["db38", [32, 32], "symmetric", 2, True, True]
        record.update(shape=[1, 1, 32, 32], basis=basis, M=1024, mask="none", kept=1024)

    path.write_bytes(change_record(content("uhaar, pruned, step"), change))
    with pytest.raises(ValueError, match="record says basis="):
        checkpoint.load(path)
