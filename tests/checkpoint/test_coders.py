from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from wavprune import PruneConfig, checkpoint
from wavprune.checkpoint.coders import CODERS, Coded, Coder, Symbols
from wavprune.cli.app import main


class Plain:
    """Two bytes a symbol; chunk by chunk, or whole layers alone."""

    def __init__(self, most: int | None) -> None:
        self.most = most
        self.automatic = False

    class Encoder:
        def __init__(self) -> None:
            self.symbols = 0

        def add(self, rows: Symbols) -> bytes:
            self.symbols += rows.size
            return rows.astype("<i2").tobytes()

        def finish(self) -> Coded | None:
            return Coded(b"end", b"high", self.symbols)

    def encoder(self) -> Encoder:
        return self.Encoder()

    def decode(
        self,
        values: memoryview,
        high: memoryview,
        parameter: int,
        shapes: Sequence[tuple[int, int]],
    ) -> Iterator[Symbols]:
        assert bytes(values[-3:]) == b"end"
        assert bytes(high) == b"high"
        assert parameter == sum(rows * length for rows, length in shapes)
        start = 0
        for rows, length in shapes:
            yield np.frombuffer(values, "<i2", rows * length, start).astype(np.int16)
            start += 2 * rows * length


@pytest.fixture(params=[None, 1 << 18])
def plain(request: pytest.FixtureRequest) -> Iterator[Coder]:
    coder = Plain(request.param)
    CODERS.register("plain", coder)
    yield coder
    if "plain" in CODERS:
        CODERS.unregister("plain")


@pytest.mark.parametrize("config", [None, PruneConfig(sparsity=0.8)])
def test_a_coder_is_one_class(tmp_path: Path, plain: Coder, config: PruneConfig | None) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(8, 16, 3), nn.Conv2d(192, 192, 3))
    saved = checkpoint.save(net, tmp_path / "x.safetensors", coder="plain", config=config)
    expected = checkpoint.save(net, tmp_path / "y.safetensors", coder="zstd", config=config)
    coders = [layer.coder for layer in saved.layers]
    assert coders == (["plain", "plain"] if plain.most is None else ["plain", "zstd"])
    assert [layer.checksum for layer in saved.layers] == [
        layer.checksum for layer in expected.layers
    ]
    found, other = checkpoint.load(saved.path), checkpoint.load(expected.path)
    assert all(torch.equal(found[name], other[name]) for name in other)


def test_a_registered_coder_is_an_option_of_a_run(tmp_path: Path, plain: Coder) -> None:
    net = nn.Sequential(nn.Conv2d(8, 16, 3))
    path = tmp_path / "x.safetensors"
    checkpoint.save(net, path, coder="plain")
    CODERS.unregister("plain")
    with pytest.raises(ValueError, match="record says coder='plain'"):
        checkpoint.load(path)
    with pytest.raises(ValueError, match="unknown coder 'plain'; allowed: auto, zstd, ans"):
        checkpoint.save(net, path, coder="plain")


def test_the_command_line_lists_the_coders(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compress", "--help"]) == 0
    assert "[auto|zstd|ans|trellis]" in capsys.readouterr().out
