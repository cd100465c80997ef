"""A packed file, read: ``packed.py`` backwards, for bytes from anywhere."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import numpy.typing as npt
import torch

from ..errors import WavpruneError
from .decoding import checksum
from .file_slice import FileSlice
from .formats.safetensors import DTYPES as TORCH_DTYPES
from .norms import NormLink, unfold
from .packed_layout import FILLED, LOGS, RAW, Matrix, crc_of
from .packed_records import DAMAGED, Filled, Logs, Raw, Records, Stream
from .stored_basis import StoredBasis
from .trellis import Floats
from .trellis_coder import COLUMNS, Classes, Coded, Decoder, decoding_tables


class Unpacked:
    """The tensors of a file's bytes.

    Args:
        data: the file's tensor.
        max_bytes: how many bytes all tensors together may have.
        aliases: count tied tensors under each name.
        compiled: decode by the compiled operators, where they are there.

    Attributes:
        names: of all tensors, in the order of the model.
        aliases: tied tensors: name -> the one that it stands for.
        metadata: of the file that was compressed.
        records: what the bytes say of the tensors.

    Raises:
        WavpruneError: the bytes are not those of a model, or it is too large.
    """

    def __init__(
        self,
        data: bytes | memoryview | FileSlice,
        max_bytes: int,
        aliases: bool = False,
        compiled: bool = True,
    ) -> None:
        self._data = data if isinstance(data, FileSlice) else memoryview(data)
        self._compiled = compiled
        self.records = records = Records(self._data, max_bytes, aliases)
        self.names, self.aliases = records.names, records.aliases
        self.metadata = records.metadata
        self._synthesis: dict[int, Floats] = {}
        self.stream_of = {name: stream for stream in records.streams for name in stream.names}
        self._tables: npt.NDArray[np.uint32] | None = None

    @property
    def data(self) -> memoryview | FileSlice:
        """The bytes of the file's tensor."""
        return self._data

    @property
    def size(self) -> int:
        """How many they are."""
        return len(self._data)

    def is_matrix(self, name: str) -> bool:
        """True where a tensor is stored as indices."""
        return isinstance(self.records.entries[name], Matrix)

    def kind(self, name: str) -> tuple[str, tuple[int, ...]]:
        """The dtype and the shape of a tensor."""
        entry = self.records.entries[self.aliases.get(name, name)]
        if isinstance(entry, Matrix):
            return entry.dtype, entry.layout.shape
        return entry.dtype, entry.shape

    @property
    def links(self) -> list[NormLink]:
        """The batch norms that are unfolded from layers."""
        return list(dict.fromkeys(self.records.links.values()))

    def plain(self, name: str) -> tuple[int, int]:
        """How a tensor that is no matrix is stored, ``RAW``, ``FILLED`` or ``LOGS``, and its bytes.

        Those of logarithms are about.
        """
        entry = self.records.entries[name]
        assert not isinstance(entry, Matrix)
        if isinstance(entry, Filled):
            return FILLED, len(entry.value)
        return (RAW, entry.size) if isinstance(entry, Raw) else (LOGS, entry.values.size)

    def matrices(self) -> Iterator[tuple[str, StoredBasis | None, Floats, int]]:
        """Every matrix: its name, basis, coefficients ``(R, C)`` and bytes in its stream.

        Raises:
            WavpruneError: one is damaged.
        """
        for stream in self.records.streams:
            decoder, before = self._decoder(stream), 0
            for name in stream.names:
                entry = self.records.entries[name]
                assert isinstance(entry, Matrix)
                basis = None if entry.basis is None else self.records.bases[entry.basis][0]
                coefficients = decoder.read(self.records.classes[name], entry.step)
                yield name, basis, coefficients, 2 * (decoder.words_read - before)
                before = decoder.words_read

    def tensors(self, itemsize: int | None = None) -> Iterator[tuple[str, torch.Tensor]]:
        """All tensors but the tied ones, as bytes where torch lacks the dtype.

        Args:
            itemsize: only those whose elements have so many bytes.

        Raises:
            WavpruneError: one is damaged.
        """

        def asked(dtype: str) -> bool:
            # What torch lacks has elements of a byte or less, but for complex numbers.
            known = TORCH_DTYPES.get(dtype)
            return itemsize is None or itemsize == (1 if known is None else min(8, known.itemsize))

        waiting: dict[str, torch.Tensor] = {}
        for name, tensor in self._stored(asked):
            link = self.records.links.get(name)
            if link is None:
                yield name, tensor
                continue
            waiting[name] = tensor
            if waiting.keys() >= set(link.names):
                unfolded = unfold(link, {part: waiting.pop(part) for part in link.names})
                yield from unfolded.items()
        # A batch norm may have another dtype than its layer.
        for name in waiting:
            yield name, self.tensor(name)

    def _stored(self, asked: Callable[[str], bool]) -> Iterator[tuple[str, torch.Tensor]]:
        for name, entry in self.records.entries.items():
            if not isinstance(entry, Matrix) and asked(entry.dtype):
                yield name, self._plain(name, entry)
        for stream in self.records.streams:
            if any(asked(self.kind(name)[0]) for name in stream.names):
                for name, tensor in self._decoded(stream):
                    if asked(self.kind(name)[0]):
                        yield name, tensor

    def tensor(self, name: str) -> torch.Tensor:
        """One tensor, without decoding what is in other streams.

        Raises:
            WavpruneError: it is damaged.
        """
        name = self.aliases.get(name, name)
        link = self.records.links.get(name)
        return self.stored(name) if link is None else self.unfolded(link)[name]

    def unfolded(self, link: NormLink) -> dict[str, torch.Tensor]:
        """A layer's weight and the tensors of the batch norm that is taken out of it.

        Raises:
            WavpruneError: one is damaged, or they do not fit one another.
        """
        return unfold(link, {part: self.stored(part) for part in link.names})

    def stored(self, name: str) -> torch.Tensor:
        """A tensor as it is in the file, before a batch norm is taken out of it.

        Raises:
            WavpruneError: it is damaged.
        """
        entry = self.records.entries[name]
        if not isinstance(entry, Matrix):
            return self._plain(name, entry)
        for found, tensor in self._decoded(self.stream_of[name]):
            if found == name:
                return tensor
        raise AssertionError(name)

    def _plain(self, name: str, entry: Raw | Filled | Logs) -> torch.Tensor:
        dtype = TORCH_DTYPES.get(entry.dtype)
        if isinstance(entry, Logs):
            return torch.from_numpy(entry.values).to(dtype)
        if isinstance(entry, Filled):
            assert dtype is not None
            one = torch.frombuffer(bytearray(entry.value), dtype=torch.uint8).view(dtype)
            return one.expand(entry.shape).clone() if entry.shape else one.reshape(())
        part = self._data[entry.start : entry.start + entry.size]
        if _crc(part) != entry.crc:
            raise WavpruneError(DAMAGED)
        if not entry.size:
            return torch.empty(entry.shape if dtype else (0,), dtype=dtype or torch.uint8)
        # What was read from a file is in memory of its own.
        own = part if isinstance(self._data, FileSlice) else bytearray(part)
        values = torch.frombuffer(own, dtype=torch.uint8)
        return values if dtype is None else values.view(dtype).view(entry.shape)

    def coded(self, stream: Stream) -> memoryview:
        """The states and words of a stream.

        Raises:
            WavpruneError: they are damaged.
        """
        start = stream.start
        stop = start + 4 * COLUMNS + 2 * stream.words
        part = self._data[start:stop]
        if _crc(part) != int.from_bytes(self._data[stop : stop + 4], "little"):
            raise WavpruneError(DAMAGED)
        return part

    def _decoder(self, stream: Stream) -> Decoder:
        part = self.coded(stream)
        if self._tables is None:
            assert self.records.frequencies is not None
            self._tables = decoding_tables(self.records.frequencies)
        states = np.frombuffer(part[: 4 * COLUMNS], dtype="<u4").astype(np.uint32)
        words = np.frombuffer(part[4 * COLUMNS :], dtype="<u2")
        return Decoder(Coded(states, words, stream.escapes), self._tables, self._compiled)

    def _decoded(self, stream: Stream) -> Iterator[tuple[str, torch.Tensor]]:
        decoder = self._decoder(stream)
        for name in stream.names:
            entry = self.records.entries[name]
            assert isinstance(entry, Matrix)
            tensor = self._assembled(entry, self.records.classes[name], decoder)
            if crc_of(tensor) != entry.crc:
                raise WavpruneError(f"its tensor {name!r} is not the one that was saved")
            yield name, tensor
        decoder.end()

    # As in ``decode``: of a damaged file.
    @np.errstate(over="ignore", invalid="ignore")
    def _assembled(self, entry: Matrix, classes: Classes, decoder: Decoder) -> torch.Tensor:
        synthesis = self.synthesis(entry.basis)
        blocks = entry.layout.blocks()
        if entry.is_direct:
            tensor = entry.empty()
            decoder.read(classes, entry.step, tensor.view(classes.shape).numpy())
            return tensor
        if len(blocks) == 1:
            return entry.tensor(decoder.read(classes, entry.step), synthesis)
        tensor = entry.empty()
        for start, stop in blocks:
            part = decoder.read(classes.columns_of(start, stop), entry.step)
            entry.put(tensor, start, stop, entry.kernels(part, synthesis))
        return tensor

    def synthesis(self, number: int | None) -> Floats | None:
        """The synthesis matrix of a basis; None for the identity.

        Raises:
            WavpruneError: its bytes are not those of a basis.
        """
        if number is None:
            return None
        if number not in self._synthesis:
            basis, payload = self.records.bases[number]
            self._synthesis[number] = basis.matrix(payload)
        return self._synthesis[number]


def _crc(part: memoryview) -> int:
    return checksum(np.frombuffer(part, dtype=np.uint8))
