from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import zstandard
from torch import nn

from wavprune import checkpoint
from wavprune.checkpoint.compressor import Decompressor
from wavprune.checkpoint.portable_file import stored_frame
from wavprune.cli import main
from wavprune.errors import WavpruneError

from ..support.checkpoints import assert_same
from ..support.packed import network


@pytest.mark.parametrize("size", [0, 1, 1 << 17, (1 << 17) + 1, 300_000, 9_000_000])
def test_a_frame_that_stores_is_one_of_zstandard(size: int) -> None:
    data = np.random.default_rng(0).bytes(size)
    frame = stored_frame(data)
    assert len(frame) <= size + 6 + 3 * (1 + size // (1 << 17))
    assert zstandard.ZstdDecompressor().decompress(frame, max_output_size=size or 1) == data
    reader = Decompressor(frame)
    assert reader.read(size) == data
    reader.end()


def test_a_portable_file_has_the_same_bits(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    small, portable = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    checkpoint.save(network(), small, coder="trellis", step=0.01)
    assert main(["portable", str(small), "-o", str(portable)]) == 0
    size = portable.stat().st_size
    assert f"portable: {portable}, {size:,} bytes" in capsys.readouterr().out
    assert small.stat().st_size < size < small.stat().st_size + 2000
    assert_same(checkpoint.load(portable), checkpoint.load(small))
    # It may replace its input, and a portable file is one of version 3 as any other.
    assert checkpoint.portable(portable, portable) == size
    assert main(["portable", str(small), "-o", str(portable)]) != 0
    assert "--force" in capsys.readouterr().err


def test_other_files_are_refused(tmp_path: Path) -> None:
    net = nn.Conv2d(2, 3, 3)
    path, out = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    checkpoint.save(net, path)
    with pytest.raises(WavpruneError, match="is of version 1 or 2 of the format; save it with"):
        checkpoint.portable(path, out)
    checkpoint.save(net, path, coder="trellis", step=0.1)
    with pytest.raises(WavpruneError, match=r"output must be a file that ends in \.safetensors"):
        checkpoint.portable(path, tmp_path / "b.bin")
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(WavpruneError, match="cannot be read as a safetensors file"):
        checkpoint.portable(path, out)
    assert not out.exists()
