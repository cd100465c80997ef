"""Prune a model with the fastest backend that can."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from .common.optional import is_onnx
from .config import RULES, PruneConfig
from .engine.patterns import pattern_method
from .engine.run import prune_layers, prune_model
from .errors import WavpruneError
from .report import PruneReport

if TYPE_CHECKING:
    from onnx import ModelProto

    from .calibration.collected import Calibration


def prune(
    model: nn.Module | ModelProto,
    method: str = "dwt",
    wavelet: str = "uhaar",
    level: int | None = None,
    mode: str = "periodization",
    force_level: bool = False,
    sparsity: float | None = None,
    percentile: float | None = None,
    scope: str = "layer",
    device: str | torch.device | None = None,
    backend: str = "auto",
    targets: str | Sequence[str] | None = None,
    ignore: str | Sequence[str] | None = None,
    seed: int = 0,
    progress: bool = False,
    match: PruneReport | None = None,
    calibration: Calibration | Iterable[Any] | None = None,
    calibration_level: str = "full",
    pattern: str | None = None,
) -> PruneReport:
    """Prune the convolutions of a model, in place, and ``Linear`` weights where asked to.

    Each weight ``(Cout, Cin/groups, kh, kw)`` is a batch of ``kh x kw`` kernels, and a ``Linear``
    weight ``(out, in)`` one large kernel. ``Conv1d`` kernels are transformed along their one axis,
    ``Conv3d`` kernels along all three; those of transposed convolutions are their last axes. The
    coefficients in a basis are ranked, the least important are set to 0, and the kernels are put
    together again. A weight keeps its dtype, device, memory format and identity.

    Args:
        model: any module; every convolution in it, of one to three axes, transposed or not, is
            pruned, unless ``targets`` says otherwise. Or an ``onnx.ModelProto``, with its external
            data loaded, whose convolutions are pruned alike (extra ``onnx``); its metadata say how.
        method: ``"dwt"`` prunes in the basis ``wavelet``, ``"min_weight"`` (or ``"magnitude"``)
            the smallest weights, ``"random"`` weights drawn at random.
        wavelet: any name of ``pywt.wavelist(kind="discrete")``, ``"uhaar"`` (orthonormal Haar for
            any kernel size), ``"dct"``, ``"klt"`` (the layer's own principal components; not of a
            ``Linear`` weight, which is one kernel), ``"identity"``, or ``"auto"``: for each layer
            the one of identity, uhaar, dct and, on axes of 16 and longer, db4 and sym8 that changes
            the weight least at the layer's kept count. The report names it and the runner-up.
        level: levels of the transform, 1 or more; None means the deepest that exists.
        mode: PyWavelets' boundary mode, any of ``pywt.Modes.modes``.
        force_level: use ``level`` even where PyWavelets calls it too deep for the kernel.
        sparsity: pruned fraction relative to the weights, in [0, 1): keep the
            ``ceil((1 - sparsity) * numel)`` most important coefficients. 0.5 if neither this nor
            ``percentile`` nor ``match`` is given.
        percentile: in [0, 100]: prune coefficients below ``numpy.percentile(|C|, percentile)``
            of their layer, structural zeros included, as WaveletTransforms did.
        scope: ``"layer"`` keeps that fraction of every layer, ``"global"`` of all together.
        device: where to compute, such as ``"cuda"``; None means where each weight lives.
            ``"cuda"`` without CUDA warns once and runs on the CPU.
        backend: ``"auto"`` or a name from ``wavprune.backends.names()``; by name it runs or says
            why it can't.
        targets: names, globs (``"layer1.*"``) or ``"re:..."`` patterns of the layers to prune,
            of convolutions and ``nn.Linear`` alike; None means every convolution.
        ignore: names, globs or patterns of layers to leave as they are.
        seed: which weights ``"random"`` draws; the global random state is never touched.
        progress: show a progress bar on standard error.
        match: for ``"min_weight"`` and ``"random"``, in place of ``sparsity``: prune as much as
            this report pruned, min-weight at its overall sparsity, random at each layer's.
        calibration: a few batches of inputs ``(N, ...)``, alone, first in a tuple, or as
            ``pixel_values``, or what ``wavprune.calibrate`` made of them: then what is kept, and
            its values, follow from what each layer reads. Batch norms and biases follow; labels
            are never looked at. Magnitude is among the candidates that are compared on inputs held
            back, and ``report.decision`` says what was taken and why.
        calibration_level: ``"refit"`` keeps what magnitude keeps and solves for its values;
            ``"select"`` chooses what to keep over all layers, too; ``"sequential"`` also solves
            each layer again for what the pruned network feeds it; ``"full"`` then refines all
            layers together, by gradients of the distance to the unpruned network's outputs.
        pattern: ``"2:4"``, or any ``"N:M"``, in place of ``sparsity``: keep ``N`` of every ``M``
            weights along the input channels, as ``torch.sparse.to_sparse_semi_structured`` takes
            it of ``Linear`` weights; with ``method="min_weight"`` or ``wavelet="identity"``.

    Returns:
        What was done, a row a layer.

    Raises:
        TypeError: an argument has the wrong type.
        WavpruneError: an argument is not allowed, or a layer cannot be pruned. No weight has
            changed then.

    Example:
        >>> import torch, wavprune
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 16, 3), torch.nn.Conv2d(16, 16, 3))
        >>> report = wavprune.fast.prune(model, wavelet="uhaar", sparsity=0.75)
        >>> report.kept, report.numel
        (684, 2736)
    """
    if match is not None and (sparsity is not None or percentile is not None):
        raise WavpruneError(
            f"match was given together with sparsity={sparsity!r}, percentile={percentile!r}; "
            "give one of them"
        )
    if pattern is not None:
        if sparsity is not None or percentile is not None or match is not None:
            raise WavpruneError(
                f"pattern={pattern!r} was given together with sparsity={sparsity!r}, "
                f"percentile={percentile!r}, match={match!r}; give one of them"
            )
        method = pattern_method(pattern, method, wavelet)
        sparsity = RULES[method].sparsity
    config = PruneConfig(
        method=method,
        wavelet=wavelet,
        level=level,
        mode=mode,
        force_level=force_level,
        sparsity=sparsity,
        percentile=percentile,
        scope=scope,
        device=device,
        backend=backend,
        targets=targets,  # type: ignore[arg-type]  # PruneConfig makes a tuple of it
        ignore=ignore,  # type: ignore[arg-type]
        seed=seed,
    )
    if calibration is not None and match is not None:
        raise WavpruneError("match and calibration were both given; give one of them")
    # What a run does not need is not imported for it.
    if is_onnx(model):
        from .graph.prune import prune_as_module, prune_graph

        if calibration is None:
            return prune_graph(
                model, config, partial(prune_layers, config=config, match=match, progress=progress)
            )
    elif calibration is None:
        return prune_model(model, config, match, progress)
    from .calibration.prune import prune_calibrated

    run = partial(
        prune_calibrated,
        config=config,
        calibration=calibration,
        level=calibration_level,
        progress=progress,
    )
    return prune_as_module(model, run) if is_onnx(model) else run(model)
