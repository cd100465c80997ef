"""The decoder in C gives the bits of ``checkpoint.load``, and refuses every other file."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from wavprune import checkpoint
from wavprune.checkpoint.norms import NormLink
from wavprune.checkpoint.packed import Packer
from wavprune.errors import WavpruneError

from ..checkpoint.test_calibrated import inputs
from ..checkpoint.test_calibrated import network as with_norms
from ..checkpoint.test_packed import FIRST_FILE
from ..support import decoder as c
from ..support.decoder import Decoder, DecoderError
from ..support.packed import network

pytestmark = pytest.mark.skipif(c.COMPILER is None, reason="there is no C compiler here")

FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
CACHE = 1 << 17
# How the fuzzer's target is built without libFuzzer, whose builds define the second.
MUTATE = ["-DWAVPRUNE_MUTATE", "-DFUZZING_BUILD_MODE_UNSAFE_FOR_PRODUCTION"]


class Programs:
    """What is compiled, all at once."""

    def __init__(self, folder: Path) -> None:
        example, sanitizers = [c.EXAMPLE, c.SOURCE], c.SANITIZERS
        builds = {
            "decoder.so": ([c.SOURCE], [*c.C99, "-O2", "-shared", "-fPIC"]),
            "decode": (example, [*c.CXX17, *sanitizers]),
            "mutate": ([c.FUZZ, c.SOURCE], [*c.C99, *sanitizers, *MUTATE]),
        }
        with ThreadPoolExecutor(2) as pool:
            built = pool.map(lambda item: c.compile_(folder / item[0], *item[1]), builds.items())
            self.library, self.decode, self.mutate = built


@pytest.fixture(scope="module")
def programs(tmp_path_factory: pytest.TempPathFactory) -> Programs:
    return Programs(tmp_path_factory.mktemp("programs"))


def saved(folder: Path, model: Any, **settings: Any) -> Path:
    settings = {"coder": "trellis", "step": 0.01, **settings}
    return checkpoint.save(model, folder / "a.safetensors", **settings).path


def packed(folder: Path, packer: Packer) -> Path:
    path = folder / "a.safetensors"
    with path.open("wb") as file:
        packer.finish(folder).write(file)
    return path


def layers(dtype: torch.dtype, **settings: Any) -> Callable[[Path], Path]:
    return lambda folder: saved(folder, network().to(dtype), **settings)


def large_kernels(folder: Path) -> Path:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 5, 7), nn.Conv3d(1, 2, 3), nn.Conv1d(2, 3, 64))
    return saved(folder, model, wavelet="klt")


def streams(folder: Path) -> Path:
    torch.manual_seed(0)
    shapes = [(24, 16, 3, 3), (512, 513), (40,), (33, 7, 3, 3), (520, 512), (6, 5)]
    state = {f"{i}.weight": torch.randn(shape) / 10 for i, shape in enumerate(shapes)}
    state["3.weight"][:] = 0.5
    return saved(folder, state, targets=["re:.*"], wavelet="uhaar", step=0.001)


def extremes(folder: Path) -> Path:
    state = {}
    scales = [("F16", 65504.0), ("F32", 1e-38), ("F32", 3e38), ("F64", 1e-290), ("F64", 1e300)]
    scales += [("BF16", 1e-38), ("BF16", 3e38), ("F16", 1e-6), ("F64", 3e-308)]
    for i, (dtype, scale) in enumerate(scales):
        weight = torch.linspace(-1, 1, 8 * 8 * 9, dtype=torch.float64).reshape(8, 8, 3, 3)
        state[f"{i}.weight"] = (weight * scale).to(FLOATS[dtype])
    return saved(folder, state, wavelet="haar", step=0.003)


def odd_tensors(folder: Path) -> Path:
    torch.manual_seed(0)
    conv = torch.randn(4, 3, 3, 3)
    return saved(
        folder,
        {
            'a"\\\n.weight': conv,
            "größe.weight": torch.randn(4, 3, 3, 3).half(),
            "tied": conv,
            "scalar": torch.tensor(3),
            "empty": torch.empty(0),
            "no rows": torch.empty(0, 3, dtype=torch.float64),
            "flags": torch.tensor([True, False]),
            "filled": torch.full((3, 1, 2), -7, dtype=torch.int16),
            "eight": torch.arange(5).to(torch.float8_e4m3fn),
            "complex": torch.randn(3, dtype=torch.complex64),
            "numbers": torch.arange(9, dtype=torch.int64),
        },
    )


def no_name(folder: Path) -> Path:
    return saved(folder, {"weight": torch.randn(3, 2, 3, 3)}, wavelet="dct")


def no_tensor(folder: Path) -> Path:
    return packed(folder, Packer({"format": "pt"}))


def many_blocks(folder: Path) -> Path:
    """Records and classes that take several blocks of a frame."""
    torch.manual_seed(0)
    names = [f"{i}.".ljust(600, "x") for i in range(300)]
    weight = torch.randn(140_000, 2, 1, 1) * torch.logspace(-2, 2, 140_000).view(-1, 1, 1, 1)
    state = {f"{name}": torch.tensor(float(i)) for i, name in enumerate(names)}
    return saved(folder, {"first.weight": weight, **state, "weight": weight[::9]}, step=1e-4)


def escapes(folder: Path) -> Path:
    torch.manual_seed(0)
    weight = torch.randn(40, 12, 3, 3)
    weight[3] *= 3000
    return saved(folder, {"a.weight": weight, "b.weight": torch.randn(7, 7, 5, 5)}, step=1e-6)


def first_file(folder: Path) -> Path:
    path = folder / "a.safetensors"
    path.write_bytes(FIRST_FILE)
    return path


def calibrated(batchnorm: str) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        arguments = {"calibration": inputs(), "target_kl": 0.01, "batchnorm": batchnorm}
        path = folder / "a.safetensors"
        return checkpoint.save(with_norms(), path, **arguments).path  # type: ignore[arg-type]  # of several types

    return make


def folded_by_hand(folder: Path) -> Path:
    """Batch norms of every dtype, whose vectors are raw, filled and on a grid."""
    packer = Packer({})
    generator = np.random.default_rng(0)
    for i, (code, dtype) in enumerate(FLOATS.items()):
        reach = {"F64": 300, "F32": 20, "F16": 2, "BF16": 20}[code]

        def wide(*shape: int, reach: int = reach, dtype: torch.dtype = dtype) -> torch.Tensor:
            values = generator.normal(size=shape) * 2.0 ** generator.uniform(-reach, reach, shape)
            return torch.from_numpy(values).to(dtype)

        parts = {
            "weight": wide(150, 3, 2),
            "gamma": wide(150),
            "var": wide(150).abs() + torch.finfo(dtype).tiny,
            "mean": wide(150),
            "bias": wide(150),
        }
        parts["gamma"][3], parts["var"][4] = 0, 2.0
        if code == "F64":
            # Their squares are in the range of the grid.
            parts["var"] = parts["var"].clamp(1e-30, 1e30)
        if i % 2:
            parts["mean"] = torch.full((150,), 0.25, dtype=dtype)
        for part, tensor in parts.items():
            name = f"{code}.{part}"
            if part in ("gamma", "var") and i < 3:
                packer.logs(name, code, tensor)
            else:
                data = tensor.contiguous().view(torch.uint8).numpy().reshape(-1)
                packer.raw(name, code, tensor.shape, partial(list, [data.data]))
        weight, gamma, var, mean, bias = (f"{code}.{part}" for part in parts)
        packer.link(NormLink(weight, gamma, var, mean, bias, 1e-3 * i))
    return packed(folder, packer)


FILES: dict[str, Callable[[Path], Path]] = {
    **{wavelet: layers(torch.float32, wavelet=wavelet) for wavelet in ("identity", "haar", "klt")},
    **{
        f"{wavelet} {code}": layers(FLOATS[code], wavelet=wavelet, step=step)
        for wavelet, code, step in (
            *(("uhaar", "F64", 0.003), ("dct", "F16", 0.03), ("bior2.2", "BF16", 0.003)),
            *(("identity", "F16", 0.3), ("auto", "F32", 3e-5)),
        )
    },
    "large kernels": large_kernels,
    "streams": streams,
    "extremes": extremes,
    "odd tensors": odd_tensors,
    "no name": no_name,
    "no tensor": no_tensor,
    "many blocks": many_blocks,
    "escapes": escapes,
    "first file": first_file,
    "batch norms kept": calibrated("keep"),
    "batch norms folded": calibrated("fold"),
    "folded by hand": folded_by_hand,
}


@pytest.fixture(params=FILES)
def path(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return FILES[request.param](tmp_path)


def bytes_of(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def test_every_file_gives_the_bits_of_python(path: Path, programs: Programs) -> None:
    state = checkpoint.load(path)
    portable = path.with_name("portable.safetensors")
    assert checkpoint.portable(path, portable) == portable.stat().st_size
    again = checkpoint.load(portable)
    assert list(again) == list(state)
    for name, tensor in state.items():
        assert bytes_of(again[name]) == bytes_of(tensor)
    data = path.read_bytes()
    decoder = Decoder(programs.library, data)
    # Zstandard stores what it cannot make smaller.
    assert decoder.heads_size > 0 or not state
    fast = Decoder(programs.library, portable.read_bytes(), zstd=False, cache=CACHE)
    assert fast.heads_size == 0
    assert [fast.tensor(i).name for i in range(len(fast))] == list(state)
    # The last one first: matrices before it in its stream are passed, then read from its start.
    for i, (name, tensor) in reversed(list(enumerate(state.items()))):
        found = decoder.tensor(i)
        assert found.name == name
        assert found.shape == tensor.shape
        assert found.size == tensor.numel() * tensor.element_size() <= found.room
        assert decoder.read(i) == fast.read(i) == bytes_of(tensor), name


def test_the_example_writes_an_ordinary_file(path: Path, programs: Programs) -> None:
    """Under sanitizers, as C++, and in buffers of exactly the size that is asked for."""
    portable, out = path.with_name("portable.safetensors"), path.with_name("out.safetensors")
    checkpoint.portable(path, portable)
    run = c.decode(programs.decode, portable, out)
    assert run.returncode == 0, run.stderr
    state = checkpoint.load(path)
    assert [json.loads(line.rsplit(" ", 3)[0]) for line in run.stdout.split("\n")[:-1]] == list(
        state
    )
    from safetensors.torch import load_file

    written = load_file(out)
    assert written.keys() == state.keys()
    for name, tensor in state.items():
        assert written[name].dtype == tensor.dtype
        assert written[name].shape == tensor.shape
        assert bytes_of(written[name]) == bytes_of(tensor), name


def test_tied_tensors_are_told(tmp_path: Path, programs: Programs) -> None:
    weight = torch.randn(4, 3, 3, 3)
    path = saved(tmp_path, {"a.weight": weight, "b": torch.ones(2), "c.weight": weight})
    decoder = Decoder(programs.library, path.read_bytes())
    assert [decoder.tensor(i).same_as for i in range(3)] == [0, 1, 0]
    assert decoder.read(2) == decoder.read(0)


def test_too_little_room_is_said(tmp_path: Path, programs: Programs) -> None:
    path = saved(tmp_path, {"a.weight": torch.randn(1, 1, 26, 26)}, wavelet="dct")
    decoder = Decoder(programs.library, path.read_bytes(), cache=CACHE)
    assert decoder.read(0) == bytes_of(checkpoint.load(path)["a.weight"])
    with pytest.raises(DecoderError) as caught:
        decoder.read(0, decoder.tensor(0).room - 1)
    assert caught.value.status == c.NEEDS_ROOM
    with pytest.raises(DecoderError) as caught:
        Decoder(programs.library, path.read_bytes()).read(0)
    assert caught.value.status == c.NEEDS_ROOM
    with pytest.raises(DecoderError) as caught:
        decoder.tensor(1)
    assert caught.value.status == c.NO_TENSOR
    with pytest.raises(DecoderError) as caught:
        Decoder(programs.library, path.read_bytes(), zstd=False)
    assert caught.value.status == c.NEEDS_ZSTD


def test_every_changed_byte_and_every_cut_is_noticed(tmp_path: Path, programs: Programs) -> None:
    path = saved(tmp_path, nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)))
    checkpoint.portable(path, tmp_path / "b.safetensors")
    data = (tmp_path / "b.safetensors").read_bytes()

    def read_all(data: bytes) -> None:
        decoder = Decoder(programs.library, data)
        for i in range(len(decoder)):
            decoder.read(i)

    read_all(data)
    for position in range(len(data)):
        damaged = bytearray(data)
        damaged[position] ^= 1 << position % 8
        with pytest.raises(DecoderError):
            read_all(bytes(damaged))
    for length in (*range(0, len(data), 7), len(data) - 1):
        with pytest.raises(DecoderError):
            read_all(data[:length])
    with pytest.raises(DecoderError):
        read_all(data + b"\0")


@pytest.mark.parametrize("bits", [8, 4])
def test_other_versions_are_refused(tmp_path: Path, programs: Programs, bits: int) -> None:
    path = checkpoint.save(network(), tmp_path / "a.safetensors", bits=bits).path
    with pytest.raises(DecoderError, match="1"):
        Decoder(programs.library, path.read_bytes())
    with pytest.raises(WavpruneError, match="of version 1 or 2 of the format; save it with"):
        checkpoint.portable(path, tmp_path / "b.safetensors")


def test_hostile_files_touch_nothing_else(tmp_path: Path, programs: Programs) -> None:
    """A bounded run of the fuzzer's target; ``fuzz.c`` says how libFuzzer runs it."""
    files = []
    kinds = ["klt", "uhaar F64", "odd tensors", "no name", "batch norms kept", "folded by hand"]
    for i, kind in enumerate(kinds):
        (tmp_path / str(i)).mkdir()
        path = FILES[kind](tmp_path / str(i))
        files.append(tmp_path / f"{i}.safetensors")
        checkpoint.portable(path, files[-1])
    run = c.decode(programs.mutate, "2000", "1", *files)
    assert run.returncode == 0, run.stderr
    _, opened, decoded = (int(part.split()[0]) for part in run.stdout.split(","))
    # Not all end at their first bytes.
    assert opened > 300
    assert decoded > 300


def test_it_needs_no_library(tmp_path: Path) -> None:
    """As freestanding code it names memcpy and memset, and what a compiler makes of these."""
    compiled = c.compile_(tmp_path / "a.o", [c.SOURCE], [*c.C99, "-Os", "-ffreestanding", "-c"])
    names = subprocess.run(["nm", "-u", compiled], capture_output=True, text=True, check=True)
    assert set(names.stdout.split()) - {"U"} <= {"memcpy", "memset", "memmove", "memcmp"}
