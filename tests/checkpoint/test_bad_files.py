"""Files that are damaged, or that lie, are refused by name, and cost neither memory nor a crash."""

from __future__ import annotations

import json
import resource
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
import zstandard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from tests.tools import fuzz_checkpoint
from wavprune import PruneConfig, checkpoint
from wavprune.checkpoint.records import FIELDS

Change = Callable[[dict[str, Any]], object]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[bytes]:
    return fuzz_checkpoint.seeds(tmp_path_factory.mktemp("seeds"))


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(8, 16, 3), nn.BatchNorm2d(16))
    path = tmp_path / "x.safetensors"
    checkpoint.save(net, path, config=PruneConfig(sparsity=0.9), values="float16")
    return path


def rewrite(path: Path, change: Change, payload: Callable[[bytes], bytes] | None = None) -> None:
    """Change the metadata of a file, and its bytes, and leave the rest consistent."""
    data = path.read_bytes()
    (size,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + size])
    content = json.loads(header["__metadata__"]["wavprune"])
    change(content)
    header["__metadata__"]["wavprune"] = json.dumps(content)
    text = json.dumps(header).encode()
    rest = data[8 + size :]
    path.write_bytes(struct.pack("<Q", len(text)) + text + (payload(rest) if payload else rest))


def set_field(name: str, value: object) -> Change:
    def change(content: dict[str, Any]) -> None:
        content["layers"]["0.weight"][FIELDS.index(name)] = value

    return change


def set_basis(*fields: object) -> Change:
    def change(content: dict[str, Any]) -> None:
        content["bases"] = [list(fields)]

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda c: c.update(version=4),
            "of version 4 of the format; this wavprune reads versions 1 to 3",
        ),
        (lambda c: c.pop("version"), "of version None"),
        (lambda c: c.pop("layers"), "lacks the layers"),
        (lambda c: c.pop("checksums"), "lacks the tensors' checksums"),
        (lambda c: c["checksums"].pop("1.bias"), "checksums are not of the tensors"),
        (lambda c: c["checksums"].update({"0.weight": 1}), "checksum differs: the file is damaged"),
        (
            lambda c: c["layers"].update({"9.weight": c["layers"]["0.weight"]}),
            "bytes of '9.weight'",
        ),
        (
            lambda c: c["layers"].update({"0.weight": [1, 2]}),
            "'0.weight': its record is not one of",
        ),
        (set_field("kept", 100), "its mask keeps 116 coefficients, its record 100"),
        (set_field("kept", 1 << 40), "its record says kept="),
        (set_field("kept", -1), "its record says kept=-1"),
        (set_field("shape", [1152]), "its record says shape="),
        (set_field("shape", [16, 8, 3, 0]), "its record says shape="),
        (set_field("shape", [32, 8, 3, 3]), "'0.weight': "),
        (
            set_field("shape", [1 << 20, 1 << 20, 3, 3]),
            "says that its tensors have .* bytes; allowed",
        ),
        (set_field("dtype", "F8"), "its record says dtype='F8'"),
        (set_field("dtype", "F64"), "their checksum differs"),
        (set_field("values", "float32"), "'0.weight': "),
        (set_field("values", "int8"), "its record says values='int8'"),
        (set_field("coder", "gzip"), "its record says coder='gzip'"),
        (set_field("mask", "none"), "its record says kept="),
        (set_field("mask", "bits"), "its mask has .* bytes where 144 are due"),
        (set_field("sizes", [0, 36, 5, 0, 0]), "its parts have 41 bytes, its tensor"),
        (set_field("basis", 1), "its metadata has bases of no layer"),
        (set_field("basis", -1), "its metadata has bases of no layer"),
        (set_field("basis", None), "its metadata has bases of no layer"),
        (set_field("exponent", 1 << 20), "record says exponent="),
        (set_field("exponent", True), "record says exponent=True"),
        (set_field("crc", 5), "its weights are not those that were saved"),
        (lambda c: c.pop("bases"), "lacks the bases"),
        (lambda c: c.update(bases=[]), "record says basis=0"),
        (lambda c: c["bases"][0].__setitem__(3, 5), "the matrix of its basis 'uhaar' is damaged"),
        (lambda c: c["bases"].append(c["bases"][0]), "has bases of no layer"),
        (set_basis("x", [3, 3], 9), "is not one that this version writes"),
        (set_basis("x", [3, 3], 9, 1), "record says sizes="),
        (set_basis("x", [3, 5], 9, 1), "record says basis=0"),
        (set_basis("x", [3, 3], 0, 1), "is not one that this version writes"),
        (set_basis("x", [0, 3], 9, 1), "is not one that this version writes"),
        (set_basis("x", [3, 3], 10, 1, [3, 3], True, False), "is not one that this version"),
        (set_basis("x", [3, 3], 9, 1, [3, 4], True, True), "is not one that this version writes"),
        (set_basis("x", [3, 3], 1 << 40, 1, [3, 3], True, True), "'0.weight': "),
        (lambda c: c.update(aliases={"2.weight": "0.weight"}), "'2.weight' stands for '0.weight'"),
        (lambda c: c.update(aliases={"0.weight": "1.bias"}), "the bytes of '0.weight'"),
        (lambda c: c.update(aliases={"1.bias": "9.bias"}), "'1.bias' stands for '9.bias'"),
    ],
)
def test_what_a_file_says_wrongly_is_named(saved: Path, change: Change, message: str) -> None:
    rewrite(saved, change)
    with pytest.raises(ValueError, match=message) as caught:
        checkpoint.load(saved)
    assert str(saved) in str(caught.value)
    with pytest.raises(ValueError, match=message):
        checkpoint.decompress(saved, saved.with_name("out.safetensors"))
    assert [path.name for path in saved.parent.iterdir()] == [saved.name]


def test_a_file_that_is_not_compressed_is_refused(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    save_file({"a": torch.ones(2)}, tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match=r"has no 'wavprune': it is not compressed"):
        checkpoint.load(tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match="does not exist"):
        checkpoint.load(tmp_path / "b.safetensors")


def test_every_truncation_is_refused(tmp_path: Path, files: list[bytes]) -> None:
    path = tmp_path / "x.safetensors"
    for data in files:
        for length in {*range(0, 40), *range(40, len(data), 97), len(data) - 1}:
            path.write_bytes(data[:length])
            with pytest.raises(ValueError, match=r"x\.safetensors"):
                checkpoint.load(path)


def test_every_flipped_bit_of_the_tensors_is_found(tmp_path: Path, files: list[bytes]) -> None:
    path = tmp_path / "x.safetensors"
    for data in files:
        start = 8 + struct.unpack("<Q", data[:8])[0]
        for place in range(start, len(data), 61):
            broken = bytearray(data)
            broken[place] ^= 1 << place % 8
            path.write_bytes(broken)
            with pytest.raises(ValueError, match="checksum differs: the file is damaged"):
                checkpoint.load(path)


@settings(deadline=None, max_examples=300, suppress_health_check=list(HealthCheck))
@given(st.data())
def test_damage_anywhere_gives_the_weights_or_a_clear_error(
    tmp_path: Path, files: list[bytes], data: st.DataObject
) -> None:
    content = bytearray(data.draw(st.sampled_from(files)))
    for _ in range(data.draw(st.integers(1, 4))):
        place = data.draw(st.integers(0, len(content) - 1))
        content[place : place + data.draw(st.integers(0, 3))] = data.draw(st.binary(max_size=3))
    fuzz_checkpoint.check(bytes(content), tmp_path / "x.safetensors")


@pytest.mark.parametrize("seed", range(3))
def test_records_that_lie_give_the_weights_or_a_clear_error(
    tmp_path: Path, files: list[bytes], seed: int
) -> None:
    random = Random(seed)
    for _ in range(400):
        for data in files[5:7]:
            lies = fuzz_checkpoint.changed(data, random)
            fuzz_checkpoint.check(lies, tmp_path / "x.safetensors")


@pytest.mark.parametrize("scale", [3e38, float("inf"), float("nan")])
def test_values_of_any_size_are_refused_without_a_warning(
    tmp_path: Path, files: list[bytes], scale: float
) -> None:
    for data in (files[0], files[1]):
        start = 8 + struct.unpack("<Q", data[:8])[0]
        header, content = json.loads(data[8:start]), bytearray(data[start:])
        first, _ = header["0.weight"]["data_offsets"]
        struct.pack_into("<f", content, first, scale)
        path = tmp_path / "x.safetensors"
        path.write_bytes(fuzz_checkpoint.with_checksums(header, content))
        with pytest.raises(ValueError, match="its weights are not those that were saved"):
            checkpoint.load(path)


BOMB = """
import resource, sys
from wavprune import checkpoint
from wavprune.checkpoint import decoding, synthesis
import torch, zstandard, constriction
used = int(open("/proc/self/statm").read().split()[5]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_DATA, (used + (1 << 28), used + (1 << 28)))
try:
    checkpoint.load(sys.argv[1])
except ValueError as error:
    print(error)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="RLIMIT_DATA counts mapped memory on Linux")
@pytest.mark.parametrize("lie", ["shape", "stream"])
def test_a_bomb_does_not_go_off(saved: Path, lie: str) -> None:
    """A kilobyte that says it is gigabytes is refused within 256 MiB."""
    if lie == "shape":
        rewrite(saved, set_field("shape", [1 << 16, 1 << 14, 3, 3]))
        expected = "says that its tensors have"
    else:
        bomb = zstandard.ZstdCompressor(level=19).compress(bytes(1 << 31))
        net = nn.Sequential(nn.Conv2d(8, 16, 3, bias=False))
        checkpoint.save(net, saved, values="float32")
        data = saved.read_bytes()
        size = 8 + struct.unpack("<Q", data[:8])[0]
        header = json.loads(data[8:size])
        content = json.loads(header["__metadata__"]["wavprune"])
        record = content["layers"]["0.weight"]
        import zlib

        sizes = record[FIELDS.index("sizes")]
        before, rest = data[size:][: sum(sizes[:2])], data[size:][sum(sizes[:3]) :]
        sizes[2] = len(bomb)
        payload = before + bomb + rest
        content["checksums"]["0.weight"] = zlib.crc32(payload)
        header["__metadata__"]["wavprune"] = json.dumps(content)
        header["0.weight"]["shape"] = [len(payload)]
        header["0.weight"]["data_offsets"] = [0, len(payload)]
        text = json.dumps(header).encode()
        saved.write_bytes(struct.pack("<Q", len(text)) + text + payload)
        expected = "holds more values than it says"
    run = subprocess.run(
        [sys.executable, "-c", BOMB, str(saved)], capture_output=True, text=True, check=True
    )
    assert expected in run.stdout
    assert resource.RLIMIT_DATA


def test_a_bounded_run_of_the_fuzz_target_finds_nothing() -> None:
    pytest.importorskip("atheris", reason="atheris is not installed")
    target = Path(__file__).parents[1] / "tools" / "fuzz_checkpoint.py"
    run = subprocess.run(
        [sys.executable, str(target), "-runs=10000", "-seed=1"],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert run.returncode == 0, run.stderr[-4000:]
    assert "Done 10000 runs" in run.stderr
