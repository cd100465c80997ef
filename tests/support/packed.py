"""Networks for packed files, and what decoding them on a device is compared by."""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from tests.support.cases import bits
from wavprune import checkpoint
from wavprune.checkpoint.loading import open_packed
from wavprune.checkpoint.trellis_coder import Coded, Decoder, decoding_tables
from wavprune.checkpoint.unpacked import Unpacked
from wavprune.errors import WavpruneError

WAVELETS = ("identity", "uhaar", "haar", "klt")
DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


def network(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    """Every way in which a weight is a matrix, and tensors beside them."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = nn.Sequential(
            nn.Conv2d(3, 8, 3),
            nn.BatchNorm2d(8),
            nn.Conv2d(8, 12, 1),
            nn.ConvTranspose2d(12, 6, 3, groups=2),
            nn.Conv2d(6, 6, 5, groups=6),
            nn.Linear(40, 33),
            nn.Conv1d(5, 7, 3),
            nn.Conv3d(2, 3, (2, 3, 3)),
        )
    return net.to(dtype).eval()


def heavy_tailed(*shape: int, seed: int = 0) -> torch.Tensor:
    """Rows and columns of all magnitudes, with a few weights far beyond: classes and escapes."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(shape, generator=generator) ** 5
    rows = torch.randn(shape[0], generator=generator).mul(2).exp()
    columns = torch.randn(shape[1], generator=generator).exp()
    scale = rows[:, None] * columns
    return weight * scale.reshape(*scale.shape, *(1 for _ in shape[2:])) * 1e-2


def even(dtype: torch.dtype, scale: float) -> torch.Tensor:
    """8x8 kernels whose values are evenly spread from ``-scale`` to ``scale``."""
    values = torch.linspace(-1, 1, 8 * 8 * 9, dtype=torch.float64).reshape(8, 8, 3, 3) * scale
    return values.to(dtype)


def save_with_norms(path: Path) -> nn.Sequential:
    """A network with tied weights, of which a file was made that keeps its batch norm."""
    torch.manual_seed(0)
    net = nn.Sequential(
        *(nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU()),
        *(nn.Conv2d(16, 16, 3, padding=1), nn.Conv2d(16, 16, 3, padding=1), nn.Conv2d(16, 8, 1)),
    )
    net[4].weight = net[3].weight
    batches = list(torch.randn(2, 8, 3, 8, 8).unbind())
    checkpoint.save(net.eval(), path, calibration=batches, target_kl=0.01, batchnorm="keep")
    return net


def damage(path: Path, at: int) -> None:
    """Change a coded byte of a file's first stream, and repair its checksum."""
    packed = open_packed(path, None)
    assert packed is not None
    stream = packed.records.streams[0]
    data = bytearray(path.read_bytes())
    begin = len(data) - packed.size + stream.start
    end = begin + 128 + 2 * stream.words
    part = data[begin:end]
    part[at] ^= 0x10
    data[begin:end] = part
    data[end : end + 4] = zlib.crc32(part).to_bytes(4, "little")
    path.write_bytes(bytes(data))


def cpu_accepts(packed: Unpacked, coded: bytes) -> bool:
    """Whether the CPU decodes these bytes, in place of those of the only stream, to a right end."""
    (stream,) = packed.records.streams
    part = coded[: 128 + 2 * stream.words]
    states = np.frombuffer(part[:128], dtype=np.uint32)
    own = Coded(states, np.frombuffer(part[128:], dtype=np.uint16), stream.escapes)
    assert packed.records.frequencies is not None
    decoder = Decoder(own, decoding_tables(packed.records.frequencies))
    try:
        for name in stream.names:
            decoder.read(packed.records.classes[name], 1.0)
        decoder.end()
    except WavpruneError:
        return False
    return True


def assert_same_bits(found: Mapping[str, torch.Tensor], expected: Mapping[str, Any]) -> None:
    """The same names in the same order, dtypes, shapes and bits."""
    assert list(found) == list(expected)
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert found[name].shape == tensor.shape, name
        assert bits(found[name].cpu().reshape(-1)) == bits(tensor.cpu().reshape(-1)), name
