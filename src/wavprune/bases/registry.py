"""Families of bases by name, and the bases that they build.

A new basis is one file: a ``Family`` and ``register(name, family)``; every backend, ``auto``, the
command line and compressed files take it from there.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..common.cache import ByteCache
from ..config import AUTO, BASES, WAVELETS, PruneConfig
from ..errors import WavpruneError
from .basis import Basis, Kernel, Request
from .kernels import as_kernels, kernel_shape
from .matrices import Matrix
from .transform import Array, MatrixTransform, Transform
from .volumes import volume_basis


class Family:
    """How the bases of some names are built.

    Attributes:
        data_driven: True where a basis is computed from the weight of its layer.
        transforms: False where the basis is the identity on every kernel.
    """

    data_driven = False
    transforms = True

    def max_level(self, name: str, kernel: Kernel) -> int:
        """The deepest level that exists on kernels of this size; 0 where no transform fits."""
        raise NotImplementedError

    def build(self, request: Request) -> Basis:
        """The basis.

        Raises:
            WavpruneError: there is no such basis for these kernels.
        """
        raise NotImplementedError

    def check(self, request: Request) -> None:
        """Raise WavpruneError where a data-driven family builds no such basis."""
        del request

    def build_all(
        self, requests: Sequence[Request], weights: Sequence[torch.Tensor]
    ) -> list[Basis]:
        """The bases of several weights ``(..., kh, kw)``, which a data-driven family looks at.

        Raises:
            WavpruneError: there is no such basis for a weight.
        """
        raise NotImplementedError

    def restore(self, request: Request, matrix: Matrix) -> Basis:
        """A data-driven basis from the analysis matrix that was stored of it, ``(K, K)``."""
        raise NotImplementedError

    def transform(self, basis: Basis, kernels: Array) -> Transform:
        """What the ``reference`` backend runs on kernels ``(n, kh, kw)``."""
        del kernels
        return MatrixTransform(basis)


def register(name: str, family: Family) -> None:
    """Make a basis available under a name, everywhere that takes a ``wavelet``."""
    BASES.register(name, family)


def family_of(name: str) -> Family:
    """The family of a name.

    Raises:
        WavpruneError: nothing is registered under it.

    Example:
        >>> family_of("klt").data_driven
        True
    """
    family: Family = BASES[name]
    return family


def names() -> list[str]:
    """The names of all registered bases, PyWavelets' wavelets last.

    Example:
        >>> names()[:4]
        ['uhaar', 'dct', 'klt', 'identity']
    """
    return [*(name for name in BASES if name not in WAVELETS), *WAVELETS]


def max_level(name: str, kernel: Kernel) -> int:
    """The deepest level that exists for this basis on kernels of this size.

    Example:
        >>> max_level("haar", (3, 3)), max_level("bior4.4", (3, 3)), max_level("uhaar", (3, 3))
        (1, 0, 2)
    """
    return family_of(name).max_level(name, kernel)


def named_basis(
    name: str,
    kernel: Kernel,
    mode: str = "periodization",
    level: int | None = None,
    force_level: bool = False,
    axes: tuple[int, ...] | None = None,
) -> Basis:
    """The basis of that name for kernels of that size.

    Args:
        name: any registered name but a data-driven one (``"klt"``).
        kernel: ``(kh, kw)``.
        mode: PyWavelets' boundary mode.
        level: how many levels; None means the deepest that exists.
        force_level: use ``level`` even where PyWavelets calls it too deep for the kernel.
        axes: ``(n,)`` for one transform along the axis of ``n x 1`` kernels, as ``pywt.wavedec``
            does it; ``(kd, kh, kw)`` for ``kernel=(kd, kh * kw)``: each plane is transformed, and
            then along the depth. None means both axes of ``kernel``.

    Raises:
        WavpruneError: there is no such basis.

    Example:
        >>> named_basis("haar", (3, 3)).grid
        (4, 4)
    """
    request = Request(name, kernel, mode, level, force_level, axes)
    family = family_of(name)
    if family.data_driven:
        raise WavpruneError(f"{name!r} is computed from a weight; use basis_for(config, weight)")
    return _CACHE.get((family, request), lambda: _built(family, request))


def _built(family: Family, request: Request) -> Basis:
    name, _, mode, level, force_level, axes = request
    if axes is None or len(axes) == 1 or not family.transforms:
        return family.build(request)
    depth, *plane = axes
    settings = (mode, level, force_level)
    along = named_basis(name, (depth, 1), *settings, axes=(depth,))
    return volume_basis(request, along, named_basis(name, (plane[0], plane[1]), *settings))


def transform_of(basis: Basis, kernels: Array) -> Transform:
    """What the ``reference`` backend runs on kernels ``(n, kh, kw)``.

    Example:
        >>> kernels = torch.ones(1, 4, 4).numpy()
        >>> transform_of(named_basis("dct", (4, 4)), kernels).forward(kernels).sum().round(6)
        np.float32(4.0)
    """
    if basis.axes is not None and len(basis.axes) == 3:
        return MatrixTransform(basis)
    return family_of(basis.name).transform(basis, kernels)


def basis_for(config: PruneConfig, weight: torch.Tensor) -> Basis:
    """The basis of one layer.

    Args:
        config: method, wavelet, level, mode and force_level are read.
        weight: ``(Cout, Cin/groups, kh, kw)``, with one or three spatial axes likewise, or
            ``(out, in)``: a matrix is one kernel, and without a transform ``out * in`` kernels of
            one value. The values matter to a data-driven basis (``"klt"``) alone.

    Returns:
        The basis; equal for all layers of this kernel size, unless it is data-driven.

    Raises:
        WavpruneError: the basis does not exist for this weight: ``"klt"`` of a matrix, which is
            one kernel; or ``"auto"``, which is none.

    Example:
        >>> basis_for(PruneConfig(wavelet="haar"), torch.zeros(8, 4, 3, 3)).grid
        (4, 4)
    """
    return bases_of([request_for(config, weight)], [weight])[0]


def request_for(config: PruneConfig, weight: torch.Tensor) -> Request:
    """Which basis a layer gets; see ``basis_for``.

    Args:
        config: method, wavelet, level, mode and force_level are read.
        weight: as ``basis_for`` takes it; only its shape matters.

    Raises:
        WavpruneError: the basis does not exist for a weight of this shape.

    Example:
        >>> request_for(PruneConfig(wavelet="klt"), torch.zeros(8, 4, 3, 3)).size
        '3x3'
    """
    kernel, axes = kernel_shape(weight.shape)
    name = config.basis_name
    if kernel == (1, 1) or (weight.ndim == 2 and (name == "identity" or not weight.numel())):
        return Request("identity", (1, 1))
    if name == AUTO:
        raise WavpruneError(
            f"wavelet={AUTO!r} is a choice among bases, which pruning makes; name one of them"
        )
    family = family_of(name)
    request = Request(name, kernel, config.mode, config.level, config.force_level, axes)
    if family.data_driven:
        if weight.ndim == 2:
            raise WavpruneError(
                f"{name!r} finds the principal components of many kernels, and a "
                f"{kernel[0]}x{kernel[1]} matrix is one; allowed for it: every other basis"
            )
        family.check(request)
    return request


def bases_of(requests: Sequence[Request], weights: Sequence[torch.Tensor]) -> list[Basis]:
    """The bases of several layers; those of a data-driven family are computed together.

    Args:
        requests: what each gets, from ``request_for``.
        weights: their weights.

    Raises:
        WavpruneError: there is no such basis for a weight.

    Example:
        >>> weights = [torch.ones(8, 4, 3, 3), torch.ones(8, 4, 5, 5)]
        >>> requests = [Request("klt", (3, 3)), Request("dct", (5, 5))]
        >>> [basis.name for basis in bases_of(requests, weights)]
        ['klt', 'dct']
    """
    together: dict[Family, list[int]] = {}
    for i, request in enumerate(requests):
        family = family_of(request.name)
        if family.data_driven:
            together.setdefault(family, []).append(i)
    driven: dict[int, Basis] = {}
    for family, members in together.items():
        kernels = [as_kernels(weights[i]) for i in members]
        built = family.build_all([requests[i] for i in members], kernels)
        driven.update(zip(members, built, strict=True))
    return [
        driven[i] if i in driven else named_basis(*request) for i, request in enumerate(requests)
    ]


def _bytes(basis: Basis) -> int:
    """What a basis takes once everything about it was asked for."""
    if basis.is_dense:
        # A and S, and both again in each of the two operators.
        return 6 * 8 * basis.num_values * basis.grid[0] * basis.grid[1]
    assert basis.factors is not None
    axes = (axis for level in basis.factors.levels for axis in level)
    # Two masks of the structural zeros.
    masks = 2 * basis.grid[0] * basis.grid[1]
    return masks + sum(axis.analysis.nbytes + axis.synthesis.nbytes for axis in axes)


_CACHE = ByteCache[Basis](256 << 20, _bytes)
