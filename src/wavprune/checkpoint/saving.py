"""Compressed checkpoints, written tensor by tensor."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import nn

from ..atomic import replaced
from ..config import AUTO, PruneConfig
from ..report import PruneReport
from .coders import ANS, ZSTD, bytes_of
from .container import KEY, Writer, written
from .encode import Encoded, Quantiser, encode
from .plan import SUFFIX, Plan, choose_tensors, quantising
from .rate import Search
from .record import FLOATS, SYMBOLS, Contents, Record
from .report import SavedLayer, SaveReport
from .sources import Source, Tensor, tensors_of

BITS = (8, 6, 4)
CODERS = ("auto", ZSTD, ANS)
Model = nn.Module | Mapping[str, torch.Tensor] | str | os.PathLike[str]


@torch.no_grad()
def save(
    model: Model,
    path: str | os.PathLike[str],
    *,
    report: PruneReport | None = None,
    config: PruneConfig | None = None,
    wavelet: str | None = None,
    targets: Sequence[str] | str | None = None,
    ignore: Sequence[str] | str | None = None,
    bits: int | None = None,
    values: str | None = None,
    step: float | None = None,
    target_bytes: int | None = None,
    target_bits_per_weight: float | None = None,
    coder: str = "auto",
) -> SaveReport:
    """Write a model's tensors as a compressed safetensors file.

    The chosen layers are stored as coefficients of a basis, quantised and entropy-coded; all other
    tensors as they are. With ``config`` the layers are pruned first, the model itself is not
    changed; with ``report`` they were pruned before, and what was kept is stored. With neither,
    nothing is pruned but what is rounded to 0.

    One of five says how exact the values are; without any, ``bits=8``. With ``step`` or a target,
    the steps of all layers follow from one number: a layer's step is that number times the
    Frobenius norm of its weight. That gives the least sum over the layers of their squared relative
    errors for the bytes, by one slope for all: at fine steps, the error of a layer of N weights is
    ``N step^2 / 12``, and falls by the factor ``1/4`` for N bits (Gish and Pierce 1968,
    "Asymptotically efficient quantizing").

    Args:
        model: a module, a state dict, or the path of a checkpoint that ``wavprune prune`` takes,
            which is then read tensor by tensor.
        path: the ``.safetensors`` file to write, which appears when it is complete.
        report: what pruning this model reported.
        config: how to prune; ``scope="layer"`` alone.
        wavelet: without ``report`` and ``config``: the basis, or ``"auto"`` (the default) for the
            one of each layer that takes the fewest bits.
        targets: without ``report`` and ``config``: layer names, globs or ``"re:..."`` patterns of
            the 4-D and 2-D ``*.weight`` tensors to compress; None means all 4-D ones.
        ignore: patterns of layers to leave as they are.
        bits: 8, 6 or 4: of each value, with a scale for each output channel.
        values: ``"float32"`` or ``"float16"``.
        step: above 0: the distance of neighbouring values over the norm of the weight.
        target_bytes: how large the file becomes, within 2%.
        target_bits_per_weight: the same, for each element of all tensors.
        coder: ``"zstd"``, ``"ans"`` (for layers of at most 262,144 coefficients), or ``"auto"``:
            what is smaller, for layers of at most 65,536 coefficients, else Zstandard.

    Returns:
        What was done. The weights that ``load`` gives have these errors and checksums, to the bit.

    Raises:
        ValueError: an argument is not allowed, does not fit the model, or a target cannot be
            reached; nothing is written.
        TypeError: ``model`` is none of what is allowed.
        ImportError: the extra ``checkpoint`` is not installed.

    Example:
        >>> import tempfile, torch, wavprune
        >>> from wavprune import checkpoint
        >>> net = torch.nn.Sequential(torch.nn.Conv2d(64, 64, 3))
        >>> path = tempfile.mkdtemp() + "/small.safetensors"
        >>> saved = checkpoint.save(net, path, config=wavprune.PruneConfig(sparsity=0.75))
        >>> saved.bytes < 4 * 64 * 64 * 9 / 8
        True
        >>> net.load_state_dict(checkpoint.load(path))
        <All keys matched successfully>
    """
    start = time.perf_counter()
    target = _checked_path(path)
    quantiser = _quantiser(bits, values, step, target_bytes, target_bits_per_weight, coder)
    plan = _plan(report, config, wavelet, targets, ignore)
    source = tensors_of(model)
    chosen = choose_tensors(source.tensors, plan)
    goal = target_bytes
    if target_bits_per_weight is not None:
        elements = sum(math.prod(tensor.shape) for tensor in source.tensors)
        goal = round(_positive("target_bits_per_weight", target_bits_per_weight) * elements / 8)
    with replaced(target) as new:
        if goal is None:
            layers = _write(source, chosen, plan, quantiser, new)
        else:
            stays = sum(t.size for t in source.tensors) - sum(t.size for t in chosen)
            search = Search(_positive("target_bytes", goal), stays, chosen, plan)
            while search.step is not None:
                quantiser = Quantiser(SYMBOLS, step=search.step, coder=coder)
                layers = _write(source, chosen, plan, quantiser, new)
                search.found(new.stat().st_size)
        size = new.stat().st_size
    uncompressed = sum(tensor.size for tensor in source.tensors)
    seconds = time.perf_counter() - start
    return SaveReport(target, size, uncompressed, tuple(layers), quantiser.step, seconds)


def _write(
    source: Source, chosen: Sequence[Tensor], plan: Plan, quantiser: Quantiser, new: Path
) -> list[SavedLayer]:
    names = {tensor.name for tensor in chosen}
    others = [tensor for tensor in source.tensors if tensor.name not in names]
    checksums: dict[str, int] = {}
    records: dict[str, Record] = {}
    layers = []
    with written(new) as writer:
        # Wide elements first, so that each begins at a multiple of its size.
        for tensor in sorted(others, key=_alignment):
            _copy(tensor, writer)
            _, checksums[tensor.name] = writer.close(tensor.name, tensor.dtype, tensor.shape)
        for tensor in chosen:
            name = tensor.name.removesuffix(SUFFIX)
            done = _store(tensor, plan, quantiser, writer)
            size, checksums[tensor.name] = writer.close(tensor.name, "U8")
            record = records[tensor.name] = done.record
            layers.append(
                SavedLayer(
                    name=name,
                    shape=record.shape,
                    wavelet=record.basis.name,
                    values=record.values,
                    coder=record.coder,
                    coefficients=record.coefficients,
                    kept=done.kept,
                    bytes=size,
                    squared_error=done.squared_error,
                    squared_norm=done.squared_norm,
                    checksum=record.crc,
                )
            )
        # In this order, loading gives the tensors.
        checksums = {tensor.name: checksums[tensor.name] for tensor in source.tensors}
        contents = Contents(source.metadata, records, checksums)
        with new.open("wb") as file:
            writer.finish(file, {"format": "pt", KEY: contents.to_json()})
    return layers


def _store(tensor: Tensor, plan: Plan, quantiser: Quantiser, writer: Writer) -> Encoded:
    # In a function of its own, so that one weight is gone before the next is read.
    layer = plan.layer(tensor)
    try:
        return encode(layer, quantiser, writer)
    except ValueError as error:
        raise ValueError(f"layer {tensor.name.removesuffix(SUFFIX)!r}: {error}") from error


def _copy(tensor: Tensor, writer: Writer) -> None:
    values = tensor.read().reshape(-1)
    if values.numel():
        writer.write(bytes_of(values.view(torch.uint8).numpy()))


def _alignment(tensor: Tensor) -> int:
    return -(tensor.size // max(1, math.prod(tensor.shape)))


def _checked_path(path: str | os.PathLike[str]) -> Path:
    target = Path(path)
    if target.suffix.lower() != ".safetensors" or target.is_dir():
        raise ValueError(f"path must be a file that ends in .safetensors, not {str(path)!r}")
    if not target.parent.is_dir():
        raise ValueError(f"{target}: there is no directory {target.parent}")
    return target


def _quantiser(
    bits: int | None,
    values: str | None,
    step: float | None,
    target_bytes: int | None,
    target_bits_per_weight: float | None,
    coder: str,
) -> Quantiser:
    given = {
        "bits": bits,
        "values": values,
        "step": step,
        "target_bytes": target_bytes,
        "target_bits_per_weight": target_bits_per_weight,
    }
    given = {name: value for name, value in given.items() if value is not None}
    if len(given) > 1:
        shown = ", ".join(f"{name}={value!r}" for name, value in given.items())
        raise ValueError(f"{shown} were given; give one of them")
    if coder not in CODERS:
        raise ValueError(f"unknown coder {coder!r}; allowed: {', '.join(CODERS)}")
    if values is not None:
        if values not in FLOATS:
            raise ValueError(f"unknown values {values!r}; allowed: {', '.join(FLOATS)}")
        return Quantiser(values, coder=coder)
    if step is not None:
        return Quantiser(SYMBOLS, step=_positive("step", step), coder=coder)
    if bits is not None and (isinstance(bits, bool) or bits not in BITS):
        raise ValueError(f"bits must be one of {', '.join(map(str, BITS))}, not {bits!r}")
    return Quantiser(SYMBOLS, bits=bits or BITS[0], coder=coder)


def _positive(name: str, value: float) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{name} must be a number above 0, not {value!r}")
    if not 0 < value < math.inf:
        raise ValueError(f"{name} must be a number above 0, not {value!r}")
    return value


def _plan(
    report: PruneReport | None,
    config: PruneConfig | None,
    wavelet: str | None,
    targets: Sequence[str] | str | None,
    ignore: Sequence[str] | str | None,
) -> Plan:
    if report is not None and not isinstance(report, PruneReport):
        raise TypeError(f"report must be a PruneReport, not {type(report).__name__}")
    if config is not None and not isinstance(config, PruneConfig):
        raise TypeError(f"config must be a PruneConfig, not {type(config).__name__}")
    own = {"wavelet": wavelet, "targets": targets, "ignore": ignore}
    own = {name: value for name, value in own.items() if value is not None}
    if report is None and config is None:
        return Plan(None, None, quantising(wavelet or AUTO, targets, ignore))
    if own or (report is not None and config is not None):
        names = [*(["report"] if report else []), *(["config"] if config else []), *own]
        raise ValueError(
            f"{', '.join(names)} were given; give one of report, config, or wavelet, targets and "
            "ignore: a report and a config say themselves which layers and which basis"
        )
    if config is not None and config.scope == "global":
        raise ValueError(
            "config: scope='global' ranks all layers together, and they are read one by one; prune "
            "first and give the report"
        )
    return Plan(config, report, None)
