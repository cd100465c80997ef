"""Checkpoints larger than the memory there is: no more than a tensor and a half at a time."""

from __future__ import annotations

import json
import os
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import onnx
from onnx import TensorProto, helper, numpy_helper

SLACK = 200 << 20
# What the limit counts is memory of the process alone: mapped files, which the system can drop
# whenever it likes, are none. What the imports take comes on top of the promise.
RUN = """
import resource, sys
import wavprune.cli
from wavprune.checkpoint import saving
import torch, zstandard, constriction, onnx.checker, onnx.numpy_helper, wavprune.onnx.stored
torch.set_num_threads(1)
used = int(open("/proc/self/statm").read().split()[5]) * resource.getpagesize()
limit = used + int(sys.argv[1])
resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
sys.exit(wavprune.cli.main(sys.argv[2:]))
"""


def sharded(directory: Path, shards: int, channels: int, per_shard: int = 2) -> tuple[Path, int]:
    """A sharded checkpoint, and the bytes of its largest tensor."""
    directory.mkdir()
    weight_map: dict[str, str] = {}
    for shard in range(shards):
        name = f"model-{shard + 1:05}-of-{shards:05}.safetensors"
        generator = torch.Generator().manual_seed(shard)
        tensors = {
            f"layers.{shard}.{i}.weight": torch.randn(channels, channels, 3, 3, generator=generator)
            for i in range(per_shard)
        }
        save_file(tensors, directory / name)
        weight_map |= dict.fromkeys(tensors, name)
    index = {"metadata": {}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    return directory, channels * channels * 9 * 4


def run(limit: int, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", RUN, str(limit), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.mark.skipif(sys.platform != "linux", reason="RLIMIT_DATA counts mapped memory on Linux")
@pytest.mark.parametrize(
    "how",
    [
        ["prune"],
        ["compress"],
        ["compress", "--sparsity", "0.5", "--wavelet", "uhaar"],
        ["compress", "--coder", "trellis", "--step", "0.001", "--wavelet", "dct"],
    ],
    ids=str,
)
def test_a_checkpoint_larger_than_the_memory(tmp_path: Path, how: list[str]) -> None:
    source, largest = sharded(tmp_path / "in", shards=4, channels=1024)
    limit = largest * 3 // 2 + SLACK
    assert limit < sum(path.stat().st_size for path in source.glob("*.safetensors"))
    output = tmp_path / ("out" if how == ["prune"] else "out.safetensors")
    done = run(limit, how[0], str(source), "-o", str(output), *how[1:])
    assert done.returncode == 0, done.stderr
    if how == ["prune"]:
        assert len(list(output.glob("*.safetensors"))) == 4
        return
    with output.open("rb") as file:
        (size,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(size))
    assert len(header) == (2 if "trellis" in how else 9)
    # The same limit holds for the way back.
    back = run(limit, "decompress", str(output), "-o", str(tmp_path / "back.safetensors"))
    assert back.returncode == 0, back.stderr


@pytest.mark.skipif("WAVPRUNE_BIG" not in os.environ, reason="needs 30 GB of disk: make big")
@pytest.mark.parametrize(
    "how",
    [
        ["prune"],
        ["compress"],
        ["compress", "--coder", "trellis", "--step", "0.001"],
        ["compress", "--coder", "trellis", "--step", "0.001", "--sparsity", "0.5"],
    ],
    ids=str,
)
def test_eight_gibibytes(tmp_path: Path, how: list[str]) -> None:
    source, largest = sharded(tmp_path / "in", shards=10, channels=4992, per_shard=1)
    assert sum(path.stat().st_size for path in source.glob("*.safetensors")) > 8 << 30
    output = tmp_path / ("out" if how == ["prune"] else "out.safetensors")
    done = run(largest * 3 // 2 + SLACK, how[0], str(source), "-o", str(output), *how[1:])
    assert done.returncode == 0, done.stderr
    shutil.rmtree(source)


@pytest.mark.skipif(sys.platform != "linux", reason="RLIMIT_DATA counts mapped memory on Linux")
@pytest.mark.parametrize("how", [[], ["--coder", "trellis", "--step", "0.01"]], ids=str)
def test_external_data_that_is_not_compressed_passes_in_pieces(
    tmp_path: Path, how: list[str]
) -> None:
    nodes = [
        helper.make_node("Conv", ["x", "c.weight"], ["a"]),
        helper.make_node("Gemm", ["z", "w"], ["y"], transB=1),
    ]
    shapes: dict[str, list[str | int | None]] = {
        "x": ["N", 3, 8, 8],
        "z": ["N", 4096],
        "a": ["N", 8, 6, 6],
        "y": ["N", 8192],
    }
    values = [helper.make_tensor_value_info(name, 1, shape) for name, shape in shapes.items()]
    large = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[8192, 4096], raw_data=b" ")
    size = 4 * 8192 * 4096
    onnx.external_data_helper.set_external_data(large, "net.data", 0, size)
    large.ClearField("raw_data")
    kernels = numpy_helper.from_array(np.ones((8, 3, 3, 3), dtype=np.float32), "c.weight")
    graph = helper.make_graph(nodes, "net", values[:2], values[2:], [kernels, large])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    (tmp_path / "net.onnx").write_bytes(model.SerializeToString())
    block = np.random.default_rng(0).normal(size=1 << 18).astype(np.float32).tobytes()
    with (tmp_path / "net.data").open("wb") as file:
        for _ in range(size // len(block)):
            file.write(block)
    output = tmp_path / "small.onnx"
    done = run(size * 3 // 4, "compress", str(tmp_path / "net.onnx"), "-o", str(output), *how)
    assert done.returncode == 0, done.stderr
    assert output.with_suffix(".safetensors").stat().st_size > size


def test_the_limit_is_one(tmp_path: Path) -> None:
    """The test above could not fail if nothing counted."""
    source, largest = sharded(tmp_path / "in", shards=1, channels=1024, per_shard=1)
    done = run(largest // 2, "compress", str(source), "-o", str(tmp_path / "x.safetensors"))
    assert done.returncode != 0
