from __future__ import annotations

import zlib

import numpy as np
import pytest
import torch

from wavprune.checkpoint.decoding import LARGE, checksum
from wavprune.common.extension import has_extension


@pytest.mark.skipif(not has_extension(), reason="the extension is not built")
def test_the_operator_gives_the_checksum_of_zlib() -> None:
    from ..support.operators import available_sets

    data = np.random.default_rng(0).integers(0, 256, 4000).astype(np.uint8)
    sizes = [*range(300), 319, 320, 511, 512, 513, 1023, 4000 - 63]
    known = 0
    try:
        for index in available_sets():
            torch.ops.wavprune.use_instruction_set(index)
            for size in sizes:
                part = data[size % 64 :][:size]
                for start in (0, 1, 0xFFFFFFFF):
                    crc = torch.ops.wavprune.crc32(torch.from_numpy(part), start)
                    known += crc >= 0
                    assert crc in (-1, zlib.crc32(part.data, start))
    finally:
        torch.ops.wavprune.use_instruction_set(-1)
    if len(available_sets()) > 1:
        assert known > len(sizes)


def test_checksums_of_arrays() -> None:
    size = 100 if LARGE > 1 << 30 else 3 * int(LARGE)
    values = np.random.default_rng(0).normal(size=size).astype(np.float32)
    for array in (values, values[:9], values[::2], values.reshape(4, -1).T, values[:0]):
        for crc in (0, 7):
            assert checksum(array, crc) == zlib.crc32(np.ascontiguousarray(array).tobytes(), crc)
    values.flags.writeable = False
    assert checksum(values) == zlib.crc32(values.tobytes())
