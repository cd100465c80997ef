"""Compressed checkpoints, written tensor by tensor."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from ..common.atomic import replaced
from ..common.checks import choice, positive
from ..common.progress import progress_bar
from ..config import PruneConfig
from ..engine.ambient import neutral
from ..engine.layers import unwrapped
from ..errors import WavpruneError
from ..graph import Model as Graph
from ..pruned import pruned_in
from ..report import PruneReport
from .calibrated import Target, save_calibrated
from .compressor import zstandard
from .container import KEY, Writer, tensor_writer
from .encoding import BasisStore, Encoded, encode
from .formats.names import layer_name, warn_skipped
from .from_weights import save_from_weights
from .plan import (
    Plan,
    choose_tensors,
    plan_of,
    pruned_together,
    recorded_tensors,
    verified,
    with_record,
)
from .quantisers import AUTO, BATCH_NORMS, FOLD, TRELLIS, Quantiser, quantiser_of
from .rate import COARSEST, FINEST, Rate
from .records import SYMBOLS, Contents, Record
from .report import SavedLayer, SaveReport
from .search import search_bytes
from .sources import Source, Tensor, tensors_of

Model = nn.Module | Mapping[str, torch.Tensor] | Graph | str | os.PathLike[str]
# How far from its target a file may be.
TOLERANCE = 0.015


@neutral()
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
    coder: str = AUTO,
    calibration: Iterable[Any] | None = None,
    target_kl: float | None = None,
    batchnorm: str | None = None,
    held_out: Iterable[Any] | None = None,
    metadata: Mapping[str, str] | None = None,
    progress: bool = False,
) -> SaveReport:
    """Write a model's tensors as a compressed safetensors file.

    The chosen layers are stored as coefficients of a basis, quantized and entropy-coded; all other
    tensors as they are, tied ones once. With ``config`` the layers are pruned first, the model
    itself is not changed; with ``report`` they were pruned before, and what was kept is stored.
    With neither, nothing is pruned but what is rounded to 0; layers that ``wavprune prune`` pruned
    in the file are stored as what was kept of them, as its metadata says, where that still holds.
    Of a module that was loaded from such a file, ``metadata`` says it.

    One of five arguments says how exact the values are; without any, ``bits=8``. With ``step`` or a
    target, the steps of all layers follow from one number: a layer's step is that number times the
    Frobenius norm of its weight. That gives the least sum over the layers of their squared relative
    errors for the bytes, by one slope for all: at fine steps, the error of a layer of N weights is
    ``N step^2 / 12``, and falls by the factor ``1/4`` for N bits (Gish and Pierce 1968,
    "Asymptotically efficient quantizing").

    With ``calibration``, the steps follow from what errors do to the outputs of the network, every
    error is made up for by the weights that are quantised after it, each layer makes up for those
    before it where that measures better, and biases are quantised too; the files are a third
    smaller at the same outputs. Then ``target_kl`` can be given in place of
    bytes: the mean divergence of the outputs, in nats, which is measured on ``held_out``, or on a
    quarter of the inputs, that nothing else looks at.

    Args:
        model: a module, a state dict, or the path of a checkpoint that ``wavprune prune`` takes,
            which is then read tensor by tensor. Of a nested checkpoint, its state dict.
        path: the ``.safetensors`` file to write, which appears when it is complete.
        report: what pruning this model reported.
        config: how to prune; with ``scope="global"`` the layers are in memory together.
        wavelet: without ``report`` and ``config``: the basis, or ``"auto"`` (the default) for the
            one of each layer that takes the fewest bits.
        targets: without ``report`` and ``config``: layer names, globs or ``"re:..."`` patterns of
            the ``*.weight`` tensors to compress; None means those of all convolutions, which have
            three to five axes.
        ignore: patterns of layers to leave as they are.
        bits: 8, 6 or 4: of each value, with a scale for each output channel.
        values: ``"float32"`` or ``"float16"``.
        step: above 0: the distance of neighboring values over the norm of the weight.
        target_bytes: how large the file becomes, within 2%.
        target_bits_per_weight: the same, for each element of all tensors.
        coder: ``"zstd"``, ``"ans"`` (for layers of at most 262,144 coefficients), or ``"auto"``:
            what is smaller, for layers of at most 65,536 coefficients, else Zstandard. With a step
            or a target, ``"trellis"`` takes the fewest bytes: each index is chosen along a trellis
            of eight states, and all layers share the tables of one code (``docs/format.md``).

        calibration: batches of inputs without labels, as ``calibrate`` takes them; the model must
            be a module. Without ``targets``, ``report`` and ``config``, all layers that the inputs
            reach are compressed, ``nn.Linear`` among them.
        target_kl: with ``calibration``, above 0. Outputs other than logits or probabilities
            ``(N, classes)`` count as half their mean squared change in units of their variance.
        batchnorm: with ``calibration``: ``"fold"`` (the default) takes batch norms into the layers
            before them, which gives the same inference and cannot be fine-tuned; ``"keep"`` stores
            them as they are, but for the mean of the errors.
        held_out: with ``calibration``: batches of inputs to measure on. Without them every fourth
            input of ``calibration`` is held back, which knows too much where inputs are parts of
            each other, such as windows of one recording or squares of one photograph.
        metadata: of the file that the model was loaded from, or ``pruned_metadata`` of a report;
            layers that it says were pruned keep their zeros.
        progress: show a progress bar on standard error, for each step that is tried, and for the
            calibration inputs.

    Returns:
        What was done. The weights that ``load`` gives have these errors and checksums, to the bit.

    Raises:
        WavpruneError: an argument is not allowed, does not fit the model, or a target cannot be
            reached; nothing is written.
        TypeError: an argument is of the wrong type.
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
    target = output_path("path", path)
    asked = Asked(calibration, target_kl, batchnorm, held_out)
    if asked.any:
        check_asked(asked, model, step=step, bits=bits, values=values, coder=coder)
        coder = TRELLIS
    quantiser = quantiser_of(
        bits, values, step, target_bytes, target_bits_per_weight, coder, target_kl
    )
    plan = plan_of(report, config, wavelet, targets, ignore)
    zstandard()
    if coder == TRELLIS and all(
        goal is None for goal in (step, target_bytes, target_bits_per_weight, target_kl)
    ):
        allowed = "step" if calibration is None else "target_kl"
        raise WavpruneError(
            f"coder={TRELLIS!r} takes a step or a target; give {allowed}, target_bytes or "
            "target_bits_per_weight"
        )
    source = tensors_of(model, scratch=target.parent)
    if metadata is not None:
        source = source._replace(pruned=pruned_in(metadata))
    plan = with_record(pruned_together(plan, source), source)
    if calibration is None:
        chosen = choose_tensors(source, plan)
        known = verified(plan, chosen, whole_matrices=coder != TRELLIS)
        if known is not plan:
            # Matrices that only a record selects are not selected without it.
            plan, chosen = known, choose_tensors(source, known)
    else:
        # Which layers are compressed follows from what the inputs reach.
        plan, chosen = verified(plan, recorded_tensors(source, plan), whole_matrices=False), []
    warn_skipped(model if isinstance(model, str | os.PathLike) else "model", source.skipped)
    goal = _goal(target_bytes, target_bits_per_weight, source)
    if calibration is not None:
        assert isinstance(model, nn.Module)
        explicit = report is not None or config is not None or targets is not None
        explicit |= ignore is not None
        return save_calibrated(
            *(unwrapped(model), calibration, held_out, plan, explicit, Target(target_kl, goal)),
            *(batchnorm or FOLD, target, progress),
        )
    if coder == TRELLIS:
        return save_from_weights(source, chosen, plan, step, goal, target, progress)
    return _run(_Job(source, chosen, plan, quantiser, goal, progress), target, start)


class Asked(NamedTuple):
    """The arguments of ``save`` that need calibration inputs, and these."""

    calibration: Iterable[Any] | None
    target_kl: float | None
    batchnorm: str | None
    held_out: Iterable[Any] | None

    @property
    def any(self) -> bool:
        """True where one was given."""
        return any(value is not None for value in self)


def check_asked(asked: Asked, model: object, *, coder: str, **others: object) -> None:
    """Check arguments that go with calibration.

    Raises:
        WavpruneError: they do not go together, or one is out of range.
        TypeError: one is of the wrong type.
    """
    if asked.calibration is None:
        settings = {"target_kl": asked.target_kl, "batchnorm": asked.batchnorm}
        given = [f"{name}={value!r}" for name, value in settings.items() if value is not None]
        if asked.held_out is not None:
            given.append("held_out")
        raise WavpruneError(
            f"{', '.join(given)} without calibration; give calibration, some batches of inputs"
        )
    if not isinstance(model, nn.Module):
        raise WavpruneError(
            f"calibration: the model must be a torch.nn.Module, which runs, not a "
            f"{type(model).__name__}"
        )
    if asked.batchnorm is not None:
        choice("batchnorm", asked.batchnorm, BATCH_NORMS)
    if asked.target_kl is not None:
        positive("target_kl", asked.target_kl)
    given = [f"{name}={value!r}" for name, value in others.items() if value is not None]
    if coder not in (AUTO, TRELLIS):
        given.append(f"coder={coder!r}")
    if given:
        raise WavpruneError(
            f"{', '.join(given)} with calibration, which chooses the steps by itself; give "
            "target_kl, target_bytes or target_bits_per_weight"
        )


def output_path(parameter: str, path: str | os.PathLike[str]) -> Path:
    """The path of a safetensors file to write.

    Raises:
        WavpruneError: it is none, or its directory is not there.
    """
    target = Path(path)
    if target.suffix.lower() != ".safetensors" or target.is_dir():
        raise WavpruneError(
            f"{parameter} must be a file that ends in .safetensors, not {str(path)!r}"
        )
    if target.exists() and not target.is_file():
        raise WavpruneError(f"{target} is not a regular file, and is not replaced")
    if not target.parent.is_dir():
        raise WavpruneError(f"{target}: there is no directory {target.parent}")
    return target


def _goal(
    target_bytes: float | None, target_bits_per_weight: float | None, source: Source
) -> float | None:
    if target_bits_per_weight is None:
        return target_bytes
    return target_bits_per_weight * source.elements / 8


@dataclass(frozen=True)
class _Job:
    """What to write.

    Attributes:
        source: all tensors.
        chosen: those to compress.
        plan: what is kept of them.
        quantiser: how exact their values are.
        goal: bytes of the file, which choose the quantiser's step; None takes it as it is.
        progress: show a bar.
    """

    source: Source
    chosen: Sequence[Tensor]
    plan: Plan
    quantiser: Quantiser
    goal: float | None
    progress: bool = False


def _run(job: _Job, target: Path, start: float) -> SaveReport:
    quantiser, goal = job.quantiser, job.goal
    layers: list[SavedLayer] = []
    with replaced(target) as new:

        def size_of(step: float) -> int:
            nonlocal quantiser, layers
            quantiser = replace(quantiser, values=SYMBOLS, bits=None, step=step)
            layers = _write(job, quantiser, new)
            return new.stat().st_size

        if goal is None:
            layers = _write(job, quantiser, new)
        else:
            unchanged = job.source.size - sum(tensor.size for tensor in job.chosen)
            rate = Rate(job.chosen, job.plan)
            first = rate.step_of(goal - unchanged)
            search_bytes(size_of, goal, TOLERANCE, first, rate.slope, (FINEST, COARSEST))
        size = new.stat().st_size
    return SaveReport(
        path=target,
        bytes=size,
        uncompressed=job.source.size,
        elements=job.source.elements,
        layers=tuple(layers),
        step=quantiser.step,
        seconds=time.perf_counter() - start,
        skipped=job.source.skipped,
        left_out=job.source.left_out,
    )


def _write(job: _Job, quantiser: Quantiser, new: Path) -> list[SavedLayer]:
    source = job.source
    compressed = {tensor.name for tensor in job.chosen}
    others = [tensor for tensor in source.tensors.values() if tensor.name not in compressed]
    checksums: dict[str, int] = {}
    records: dict[str, Record] = {}
    layers = []
    bases = BasisStore()
    total = sum(math.prod(tensor.shape) for tensor in job.chosen)
    bar = progress_bar("compress", total, "weights", job.progress)
    with tensor_writer(new) as writer, bar as advance:
        # Wide elements first, so that each begins at a multiple of its size.
        for tensor in sorted(others, key=_alignment):
            _copy(tensor, writer)
            _, checksums[tensor.name] = writer.close(tensor.name, tensor.dtype, tensor.shape)
        for tensor in job.chosen:
            done = _store(tensor, job.plan, quantiser, writer, bases)
            size, checksums[tensor.name] = writer.close(tensor.name, "U8")
            records[tensor.name] = done.record
            layers.append(_saved(layer_name(tensor.name), done, size))
            advance(math.prod(tensor.shape))
        # In this order, loading gives the tensors.
        checksums = {name: checksums[source.aliases.get(name, name)] for name in source.names}
        contents = Contents(source.metadata, records, source.aliases, checksums)
        with new.open("wb") as file:
            writer.finish(file, {"format": "pt", KEY: contents.to_json()})
    return layers


def _store(
    tensor: Tensor, plan: Plan, quantiser: Quantiser, writer: Writer, bases: BasisStore
) -> Encoded:
    # In a function of its own, so that one weight is gone before the next is read.
    layer = plan.layer(tensor)
    try:
        return encode(layer, quantiser, writer, bases, tensor.name)
    except WavpruneError as error:
        raise WavpruneError(f"layer {layer_name(tensor.name)!r}: {error}") from error


def _saved(name: str, done: Encoded, size: int) -> SavedLayer:
    record = done.record
    return SavedLayer(
        name=name,
        shape=record.shape,
        wavelet="identity" if record.basis is None else record.basis.name,
        values=record.values,
        coder=record.coder,
        coefficients=record.coefficients,
        kept=done.kept,
        bytes=size,
        error=done.error,
        norm=done.norm,
        relative_error=done.relative_error,
        checksum=record.crc,
    )


def _copy(tensor: Tensor, writer: Writer) -> None:
    for piece in tensor.pieces():
        writer.write(piece)


def _alignment(tensor: Tensor) -> int:
    return -(tensor.size // max(1, math.prod(tensor.shape)))
