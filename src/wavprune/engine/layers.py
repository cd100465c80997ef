"""Which weights to prune: a model and its settings -> named weights, all of them checked."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.utils import parametrize

from ..bases import Kernel, as_kernels
from ..common.tensors import memory_key
from ..config import PruneConfig
from ..errors import WavpruneError
from .sharding import as_sharded, in_all, local_part, problem

TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, *TRANSPOSED)
PARALLEL = (nn.DataParallel, nn.parallel.DistributedDataParallel)
# What torch.compile calls the module that it wraps.
_COMPILED = "_orig_mod"
DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True, slots=True)
class LayerRef:
    """One weight to prune.

    Attributes:
        name: the layer's name in its model, such as ``"layer1.0.conv1"``.
        weight: ``(Cout, Cin/groups, kh, kw)``, with one or three spatial axes likewise, of a
            transposed convolution ``(Cin, Cout/groups, ...)``, or ``(out, in)``; pruned in place.
        transposed: True where it is known to be of a transposed convolution.
    """

    name: str
    weight: torch.Tensor
    transposed: bool = False

    def kernels(self, kernel: Kernel) -> torch.Tensor:
        """The weight as kernels of this size, a view ``(Cout, Cin/groups, kh, kw)``.

        A matrix ``(out, in)`` is one kernel of its size, or ``out x in`` kernels of one value. Of a
        weight that is sharded, this rank's part.
        """
        weight = local_part(self.weight)
        if weight.ndim == 4:
            return weight
        if weight.ndim != 2:
            return as_kernels(weight)
        return weight[None, None] if weight.shape == kernel else weight[:, :, None, None]


def select_layers(model: nn.Module, config: PruneConfig) -> list[LayerRef]:
    """The weights of a model that ``targets`` and ``ignore`` select.

    Args:
        model: any module; every convolution in it (``nn.Conv1d``, ``Conv2d``, ``Conv3d``, their
            transposed forms, and subclasses) is selected where there are no ``targets``, and every
            ``nn.Linear`` can be selected by them.
        config: ``targets`` and ``ignore`` are read: exact names, globs (``"layer1.*"``), or
            ``"re:"`` and a regular expression that must match from the name's beginning.

    Returns:
        The selected weights in the model's order; a shared weight appears once, under its
        first name.

    Raises:
        TypeError: ``model`` is not a module.
        WavpruneError: nothing is selected, a pattern matches nothing, or a weight cannot be pruned.

    Example:
        >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 1))
        >>> [ref.name for ref in select_layers(net, PruneConfig(ignore=("2",)))]
        ['0']
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, not {type(model).__name__}")
    candidates = {
        name: module
        for name, module in named_layers(model).items()
        if isinstance(module, (*CONVOLUTIONS, nn.Linear))
    }
    names = [
        name
        for name, module in candidates.items()
        if config.targets is not None or isinstance(module, CONVOLUTIONS)
    ]
    if not names:
        hint = "; its Linear layers are pruned where targets names them" if candidates else ""
        raise WavpruneError(f"{type(model).__name__} has no convolution to prune{hint}")
    chosen = select_names(names, config)
    return unique_layers(
        LayerRef(
            name, _own_weight(name, candidates[name]), isinstance(candidates[name], TRANSPOSED)
        )
        for name in chosen
    )


def named_layers(model: nn.Module) -> dict[str, nn.Module]:
    """The modules of a model by their names in what its wrappers wrap.

    A network has the same names in ``DataParallel`` and ``DistributedDataParallel``, and where it
    or a part of it went through ``torch.compile``.

    Example:
        >>> net = nn.DataParallel(nn.Sequential(nn.Conv2d(3, 8, 3)))
        >>> list(named_layers(net))
        ['', '0']
    """
    return {
        ".".join(part for part in name.split(".") if part != _COMPILED): module
        for name, module in unwrapped(model).named_modules()
    }


def unwrapped(model: nn.Module) -> nn.Module:
    """The model within wrappers that run copies of it or compiled code."""
    while True:
        inner = model.module if isinstance(model, PARALLEL) else getattr(model, _COMPILED, None)
        if not isinstance(inner, nn.Module):
            return model
        model = inner


def select_names(names: Sequence[str], config: PruneConfig) -> list[str]:
    """The names that ``targets`` picks and ``ignore`` does not, in their given order.

    Raises:
        WavpruneError: a pattern matches no name, is not a regular expression, or nothing is left.
    """
    chosen = set(names) if config.targets is None else _matched("targets", config.targets, names)
    dropped = set() if config.ignore is None else _matched("ignore", config.ignore, names)
    kept = [name for name in names if name in chosen and name not in dropped]
    if not kept:
        raise WavpruneError(
            f"no layer is left to prune: ignore={list(config.ignore or ())} drops all that "
            f"targets={list(config.targets or ['*'])} selects"
        )
    return kept


def unique_layers(refs: Iterable[LayerRef]) -> list[LayerRef]:
    """The layers, each weight once, after a check of every one of them.

    Raises:
        WavpruneError: a weight is on the meta device, quantised, sparse, of an integer or complex
            dtype, of fewer than 2 or more than 5 axes, or overlaps itself in memory.
    """
    unique: dict[object, LayerRef] = {}
    for ref in refs:
        _check_weight(ref)
        unique.setdefault(_identity(ref.weight), ref)
    layers = list(unique.values())
    _check_overlap(layers)
    return layers


def _identity(weight: torch.Tensor) -> Hashable:
    """What two weights that are one memory share, whatever their shapes."""
    # A part of a sharded weight may be empty on some ranks only.
    if as_sharded(weight) is not None or not weight.numel():
        return id(weight)
    return memory_key(weight.detach().view(-1) if weight.is_contiguous() else weight)


def non_finite(weight: torch.Tensor) -> int:
    """How many values of a weight are NaN or infinite."""
    return weight.numel() - int(in_all(torch.isfinite(weight.detach()).sum()))


def check_finite(ref: LayerRef) -> None:
    """Raise WavpruneError where a weight holds NaN or infinite values."""
    count = non_finite(ref.weight)
    if count:
        raise WavpruneError(
            f"layer {ref.name!r}: {count} of {ref.weight.numel()} weights are NaN or infinite; "
            "allowed: finite weights"
        )


def overflow(name: str | None = None) -> WavpruneError:
    """What is raised where finite weights have coefficients that are not, of a layer if known."""
    where = "" if name is None else f"layer {name!r}: "
    return WavpruneError(
        f"{where}the coefficients overflow although every weight is finite; scale the weights down"
    )


def _matched(parameter: str, patterns: Iterable[str], names: Sequence[str]) -> set[str]:
    result: set[str] = set()
    for pattern in patterns:
        matched = _match(parameter, pattern, names)
        if not matched:
            shown = ", ".join(names[:8]) + (", ..." if len(names) > 8 else "")
            raise WavpruneError(
                f"{parameter}: {pattern!r} matches no layer; the layers are {shown}"
            )
        result |= matched
    return result


def _match(parameter: str, pattern: str, names: Sequence[str]) -> set[str]:
    if pattern in names:
        return {pattern}
    if not pattern.startswith("re:"):
        return {name for name in names if fnmatch.fnmatchcase(name, pattern)}
    try:
        expression = re.compile(pattern.removeprefix("re:"))
    except re.error as error:
        raise WavpruneError(
            f"{parameter}: {pattern!r} is not a regular expression: {error}"
        ) from error
    return {name for name in names if expression.match(name)}


def _own_weight(name: str, module: nn.Module) -> torch.Tensor:
    """The module's weight, if it is a parameter of its own.

    Raises:
        WavpruneError: it is not.
    """
    weight = module._parameters.get("weight")
    if weight is not None:
        return weight
    if "weight" in module._parameters:
        reason = "has no weight (it is None)"
    elif "weight" in module._buffers:
        reason = "has a buffer in place of a weight, which no optimizer trains"
    elif isinstance(module.__dict__.get("weight"), torch.Tensor):
        reason = (
            "has a weight that is computed before every forward pass (by a parametrization of the "
            "old kind: torch.nn.utils.prune, weight_norm), so a change to it would be lost; remove "
            "that first (torch.nn.utils.prune.remove, remove_weight_norm)"
        )
    elif parametrize.is_parametrized(module, "weight"):
        reason = (
            "has a weight that is computed by a parametrization, so a change to it would be lost; "
            "remove the parametrization first "
            "(torch.nn.utils.parametrize.remove_parametrizations)"
        )
    else:
        reason = "has no weight"
    raise WavpruneError(
        f"layer {name!r} {reason}; allowed: layers with a weight Parameter, or leave it out by "
        f"ignore={[name]!r}"
    )


def _check_overlap(refs: Sequence[LayerRef]) -> None:
    """Raise where two weights share a part of their memory: each would be pruned twice."""
    spans = []
    for ref in refs:
        weight = local_part(ref.weight)
        if weight.numel():
            steps = zip(weight.shape, weight.stride(), strict=True)
            extent = 1 + sum((size - 1) * step for size, step in steps)
            start = weight.data_ptr()
            spans.append((str(weight.device), start, start + extent * weight.element_size(), ref))
    spans.sort(key=lambda span: span[:3])
    # Those before whose memory reaches this far: a long span may go on below many short ones.
    reaching: list[tuple[str, int, int, LayerRef]] = []
    for span in spans:
        device, start, _, ref = span
        reaching = [other for other in reaching if other[0] == device and other[2] > start]
        for *_, other in reaching:
            if _overlap(other.weight, ref.weight):
                raise WavpruneError(
                    f"the weights of layers {other.name!r} and {ref.name!r} share a part of their "
                    "memory, so pruning one changes the other; allowed: weights apart from each "
                    "other, or the same weight twice"
                )
        reaching.append(span)


def _overlap(one: torch.Tensor, other: torch.Tensor) -> bool:
    """True where two dense tensors have an element in common."""
    weights = local_part(one), local_part(other)
    smallest = min(weight.element_size() for weight in weights)
    pieces = []
    for weight in weights:
        parts = torch.arange(0, weight.element_size(), smallest, device="cpu")
        pieces.append((_addresses(weight)[:, None] + parts).flatten())
    return bool(torch.isin(*pieces).any())


def _addresses(weight: torch.Tensor) -> torch.Tensor:
    """Where each element of a tensor lies in memory."""
    address = torch.full((), weight.data_ptr(), dtype=torch.int64, device="cpu")
    for size, step in zip(weight.shape, weight.stride(), strict=True):
        steps = torch.arange(size, device="cpu") * (step * weight.element_size())
        address = address[..., None] + steps
    return address.flatten()


def _overlaps_itself(weight: torch.Tensor) -> bool:
    """True where two elements of a tensor lie in the same place."""
    if weight.is_contiguous():
        return False
    extent = 0
    axes = zip(weight.stride(), weight.shape, strict=True)
    for step, size in sorted(axis for axis in axes if axis[1] > 1):
        if step <= extent:
            # Axes that are woven into each other; only their elements tell.
            return step == 0 or bool((_addresses(weight).sort().values.diff() == 0).any())
        extent += step * (size - 1)
    return False


def _has_loose_rows(weight: torch.Tensor) -> bool:
    """True where the planes of 3-D kernels are no vectors."""
    if weight.ndim != 5 or 1 in weight.shape[2:] or not weight.numel():
        return False
    row, value = weight.stride()[3:]
    return row != value * weight.shape[4]


def _is_wrapper(weight: torch.Tensor) -> bool:
    """True for a tensor subclass that only stands for other memory; a DTensor is dealt with."""
    plain = torch.Tensor.__torch_dispatch__
    return type(weight).__torch_dispatch__ is not plain and as_sharded(weight) is None


def _check_weight(ref: LayerRef) -> None:
    weight = ref.weight
    reason: str | None = None
    if nn.parameter.is_lazy(weight):
        reason = "is not initialised yet; run the model once"
    elif _is_wrapper(weight):
        reason = f"is a {type(weight).__name__}, whose values cannot be changed in place"
    elif weight.is_meta:
        reason = "is on the meta device and has no values"
    elif weight.is_quantized:
        reason = f"is quantised ({weight.dtype})"
    elif weight.layout != torch.strided:
        reason = f"is sparse ({weight.layout})"
    elif weight.dtype not in DTYPES:
        reason = f"has dtype {weight.dtype}"
    elif weight.ndim not in range(2, 6):
        reason = (
            f"has shape {tuple(weight.shape)}, not (Cout, Cin/groups, ...) with one to three "
            "spatial axes, or (out, in)"
        )
    elif (sharded := as_sharded(weight)) is not None:
        reason = problem(sharded)
    elif _overlaps_itself(weight):
        reason = f"overlaps itself in memory (strides {weight.stride()})"
    elif _has_loose_rows(weight):
        reason = f"has 3-D kernels whose rows do not follow each other (strides {weight.stride()})"
    if reason is not None:
        allowed = ", ".join(str(dtype).removeprefix("torch.") for dtype in DTYPES)
        raise WavpruneError(
            f"layer {ref.name!r}: its weight {reason}; allowed: dense weights of 2 to 5 axes, with "
            f"values, of {allowed}"
        )
