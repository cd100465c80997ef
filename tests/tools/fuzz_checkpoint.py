"""Damaged compressed files under atheris: ``python tests/tools/fuzz_checkpoint.py -runs=20000``.

Whatever the bytes are, loading gives a state dict or a WavpruneError that names the file.
``tests/checkpoint/test_bad_files.py`` runs a bounded number of cases, by hypothesis too.
"""

from __future__ import annotations

import base64
import contextlib
import importlib
import json
import sys
import tempfile
import zlib
from functools import cache
from pathlib import Path
from random import Random
from typing import Any

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
        {"step": 2e-2, "coder": "trellis", "wavelet": "dct"},
        {"target_kl": 1e-2, "calibration": [torch.randn(8, 3, 6, 6)], "batchnorm": "keep"},
    )
    files = []
    for i, kind in enumerate(kinds):
        saved = checkpoint.save(net, directory / f"{i}.safetensors", **kind)  # type: ignore[arg-type]  # of several types
        files.append(saved.path.read_bytes())
    version1 = [zlib.decompress(base64.b85decode(data)) for _, data in FILES.values()]
    return [*files, *version1]


@cache
def _stream_stop(block: bytes) -> int:
    """Where the words of a file's only stream end, after its records."""
    from wavprune.checkpoint.packed_records import Records

    (stream,) = Records(memoryview(block), MAX_BYTES, aliases=False).streams
    return 128 + 2 * stream.words


def changed(data: bytes, random: Random) -> bytes:
    """A file that was changed, with the checksums of its bytes.

    Without these nothing would get past them.

    Raises:
        ValueError: the header is broken already.
    """
    start = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:start])
    if list(header) == ["__metadata__", "wavprune"]:
        return _packed_with_other_records(header, data[start:], random)
    return _with_other_bytes(header, bytearray(data[start:]), random)


def _with_other_bytes(header: dict[str, Any], content: bytearray, random: Random) -> bytes:
    """A file of version 1 or 2 whose tensors were changed."""
    for _ in range(random.randint(1, 4)):
        content[random.randrange(len(content))] = random.choice([0, 1, 255, random.randrange(256)])
    return with_checksums(header, content)


def with_checksums(header: dict[str, Any], content: bytearray) -> bytes:
    """A file of version 1 or 2 with the checksums of its tensors."""
    said = json.loads(header["__metadata__"]["wavprune"])
    for name, entry in header.items():
        if name in said["checksums"]:
            first, last = entry["data_offsets"]
            said["checksums"][name] = zlib.crc32(content[first:last])
    header["__metadata__"]["wavprune"] = json.dumps(said)
    return _file(header, bytes(content))


def _file(header: dict[str, Any], content: bytes) -> bytes:
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + content


def _packed_with_other_records(header: dict[str, Any], block: bytes, random: Random) -> bytes:
    """A packed file whose records, classes or words were changed."""
    import zstandard

    from wavprune.checkpoint.binary import Reader, Writer

    sizes = Reader(block)
    lengths = [(sizes.number(), sizes.number()) for _ in range(2)]
    position, parts = sizes.position, []
    for length, small in lengths:
        packed = block[position : position + small]
        whole = zstandard.ZstdDecompressor().decompress(packed, max_output_size=length)
        parts.append(bytearray(whole))
        position += small
    body = bytearray(block[position + 4 :])
    for _ in range(random.randint(1, 4)):
        chosen = random.choice([*parts, parts[0], parts[0], body])
        if chosen:
            place = random.randrange(len(chosen))
            end = place + (0 if chosen is body else random.choice([0, 1, 1, 1, 2]))
            chosen[place:end] = random.randbytes(end - place)
            values = [0, 1, 127, 128, 255, random.randrange(256), chosen[place] ^ 1]
            chosen[place] = random.choice(values)
    frames = [zstandard.ZstdCompressor().compress(bytes(part)) for part in parts]
    new = Writer()
    for part, frame in zip(parts, frames, strict=True):
        new.numbers([len(part), len(frame)])
    for frame in frames:
        new.raw(frame)
    new.raw(zlib.crc32(bytes(new.data)).to_bytes(4, "little"))
    stop = _stream_stop(block)
    body[stop : stop + 4] = zlib.crc32(body[:stop]).to_bytes(4, "little")
    content = bytes(new.data) + bytes(body)
    header["wavprune"] |= {"shape": [len(content)], "data_offsets": [0, len(content)]}
    return _file(header, content)


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

        def mutate(data: bytes, max_size: int, seed: int) -> bytes:
            # Half of the time blindly, which headers need.
            if seed % 2:
                with contextlib.suppress(Exception):
                    new = changed(data, Random(seed))
                    if len(new) <= max_size:
                        return new
            mutated: bytes = atheris.Mutate(data, max_size)
            return mutated

        atheris.Setup(
            [*sys.argv, str(corpus)],
            lambda data: check(data, directory / "x.safetensors"),
            custom_mutator=mutate,
        )
        atheris.Fuzz()


if __name__ == "__main__":
    main()
