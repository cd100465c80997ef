"""Packed files that can be read without Zstandard: its frames hold their bytes as they are."""

from __future__ import annotations

import os
import zlib
from pathlib import Path

from ..common.atomic import replaced
from ..engine.ambient import neutral
from ..errors import WavpruneError
from .binary import Writer
from .container import KEY, tensor_writer
from .loading import open_packed
from .packed_layout import METADATA, TENSOR
from .packed_records import heads_of
from .saving import output_path

# A frame of RFC 8878 whose window is that of one block, without checksum.
HEADER = bytes.fromhex("28b52ffd0038")
LARGEST_BLOCK = 1 << 17


def stored_frame(data: bytes) -> bytes:
    """A Zstandard frame that holds bytes as they are."""
    starts = range(0, max(1, len(data)), LARGEST_BLOCK)
    frame = bytearray(HEADER)
    for start in starts:
        block = data[start : start + LARGEST_BLOCK]
        last = start == starts[-1]
        frame += (len(block) << 3 | last).to_bytes(3, "little") + block
    return bytes(frame)


@neutral()
def portable(
    path: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    max_bytes: int | None = None,
) -> int:
    """Write a packed file so that it is read without Zstandard, by ``csrc/decoder`` for example.

    It decodes to the same bits, here too. Names, shapes and classes, which Zstandard had
    compressed, take a few bytes a tensor and one an output and input channel.

    Args:
        path: a file that ``save`` wrote with ``coder="trellis"`` or ``calibration=``.
        output: the ``.safetensors`` file to write, which appears when it is complete.
        max_bytes: as for ``load``.

    Returns:
        The bytes of the new file.

    Raises:
        WavpruneError: as for ``load``; or the file is of version 1 or 2; or ``output`` is no
            ``.safetensors`` file.

    Example:
        >>> import tempfile
        >>> import torch
        >>> from wavprune import checkpoint
        >>> state = {"a.weight": torch.ones(2, 2, 3, 3)}
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = f"{folder}/a.safetensors"
        ...     saved = checkpoint.save(state, path, coder="trellis", step=0.1)
        ...     size = checkpoint.portable(path, path)
        ...     print(list(checkpoint.load(path)))
        ['a.weight']
    """
    path, target = Path(path), output_path("output", output)
    packed = open_packed(path, max_bytes)
    if packed is None:
        raise WavpruneError(
            f"{path} is of version 1 or 2 of the format; save it with coder='trellis' or "
            "calibration="
        )
    records, classes, start = heads_of(packed.data)
    frames = [stored_frame(part) for part in (records, classes)]
    block = Writer()
    for part, frame in zip((records, classes), frames, strict=True):
        block.numbers([len(part), len(frame)])
    for frame in frames:
        block.raw(frame)
    block.raw(zlib.crc32(bytes(block.data)).to_bytes(4, "little"))
    with (
        replaced(target) as new,
        tensor_writer(new) as writer,
        new.open("wb") as out,
    ):
        writer.write(bytes(block.data))
        writer.write(packed.data[start:])
        writer.close(TENSOR, "U8")
        return writer.finish(out, {KEY: METADATA})
