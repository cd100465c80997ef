"""ONNX operators that move values about and compute with shapes; see ``operators.py``."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional

from ..errors import WavpruneError
from .operators import Attributes, axes_of, operator, torch_pads

# What ONNX calls modes of padding and of resizing, and torch.
PADS = {"constant": "constant", "reflect": "reflect", "edge": "replicate", "wrap": "circular"}


@operator("Shape")
def _shape(attributes: Attributes, x: torch.Tensor) -> torch.Tensor:
    start, end = attributes.get("start", 0), attributes.get("end")
    return torch.tensor(list(x.shape)[start:end], dtype=torch.int64)


@operator("ConstantOfShape")
def _constant_of_shape(attributes: Attributes, shape: torch.Tensor) -> torch.Tensor:
    value = attributes.get("value")
    value = torch.zeros(1) if value is None else value
    return value.reshape(()).expand(shape.tolist()).clone()


@operator("Reshape")
def _reshape(attributes: Attributes, x: torch.Tensor, shape: torch.Tensor) -> torch.Tensor:
    sizes = [int(size) for size in shape.tolist()]
    if not attributes.get("allowzero", 0):
        sizes = [x.shape[axis] if size == 0 else size for axis, size in enumerate(sizes)]
    batch, samples = attributes.get("batch"), attributes.get("samples")
    if batch != samples and x.ndim and sizes and sizes[0] == batch != x.shape[0]:
        # The graph was written for one size of batches only.
        if x.shape[0] != samples:
            raise WavpruneError(
                f"the graph is for batches of {batch}, and got {samples} samples, which are not "
                f"the first axis of a value of {tuple(x.shape)} that is given the shape {sizes}"
            )
        sizes[0] = x.shape[0]
    return x.reshape(sizes)


@operator("Flatten")
def _flatten(attributes: Attributes, x: torch.Tensor) -> torch.Tensor:
    axis = attributes.get("axis", 1) % (x.ndim + 1)
    rows = 1
    for size in x.shape[:axis]:
        rows *= size
    return x.reshape(rows, -1)


@operator("Transpose")
def _transpose(attributes: Attributes, x: torch.Tensor) -> torch.Tensor:
    return x.permute(attributes.get("perm") or tuple(reversed(range(x.ndim))))


@operator("Squeeze")
def _squeeze(
    attributes: Attributes, x: torch.Tensor, axes: torch.Tensor | None = None
) -> torch.Tensor:
    chosen = axes_of(attributes, axes)
    return x.squeeze() if chosen is None else x.squeeze(tuple(chosen))


@operator("Unsqueeze")
def _unsqueeze(
    attributes: Attributes, x: torch.Tensor, axes: torch.Tensor | None = None
) -> torch.Tensor:
    chosen = axes_of(attributes, axes) or []
    rank = x.ndim + len(chosen)
    for axis in sorted(axis % rank for axis in chosen):
        x = x.unsqueeze(axis)
    return x


@operator("Concat")
def _concat(attributes: Attributes, *inputs: torch.Tensor) -> torch.Tensor:
    return torch.cat(inputs, attributes["axis"])


@operator("Split")
def _split(
    attributes: Attributes, x: torch.Tensor, sizes: torch.Tensor | None = None
) -> tuple[torch.Tensor, ...]:
    axis = attributes.get("axis", 0)
    given = attributes.get("split") if sizes is None else sizes.tolist()
    if given is None:
        parts = attributes.get("num_outputs", attributes["outputs"])
        given = -(-x.shape[axis] // parts)
    return torch.split(x, given if isinstance(given, int) else list(given), axis)


@operator("Slice")
def _slice(attributes: Attributes, x: torch.Tensor, *inputs: torch.Tensor | None) -> torch.Tensor:
    if inputs:
        starts, ends, axes, steps = (
            None if part is None else [int(n) for n in part.tolist()]
            for part in (*inputs, None, None)[:4]
        )
    else:
        starts, ends = list(attributes["starts"]), list(attributes["ends"])
        axes, steps = attributes.get("axes"), None
    assert starts is not None
    assert ends is not None
    for number, (start, end) in enumerate(zip(starts, ends, strict=True)):
        axis = number if axes is None else axes[number]
        step = 1 if steps is None else steps[number]
        # As Python has it, but for ends that are no place at all.
        stop = None if step < 0 and end < -x.shape[axis] else end
        places = range(x.shape[axis])[slice(start, stop, step)]
        if step > 0:
            index = [slice(None)] * x.ndim
            index[axis] = slice(places.start, places.stop, step)
            x = x[tuple(index)]
        else:
            x = x.index_select(axis, torch.tensor(list(places), device=x.device))
    return x


@operator("Gather")
def _gather(attributes: Attributes, x: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
    axis = attributes.get("axis", 0) % x.ndim
    flat = indices.to(x.device).reshape(-1)
    taken = x.index_select(axis, torch.where(flat < 0, flat + x.shape[axis], flat))
    return taken.reshape([*x.shape[:axis], *indices.shape, *x.shape[axis + 1 :]])


@operator("Pad")
def _pad(
    attributes: Attributes,
    x: torch.Tensor,
    pads: torch.Tensor | None = None,
    value: torch.Tensor | None = None,
    axes: torch.Tensor | None = None,
) -> torch.Tensor:
    said = list(attributes.get("pads", ())) if pads is None else [int(n) for n in pads.tolist()]
    if axes is not None:
        chosen = [int(axis) % x.ndim for axis in axes.tolist()]
        full = [0] * (2 * x.ndim)
        for number, axis in enumerate(chosen):
            full[axis], full[x.ndim + axis] = said[number], said[len(chosen) + number]
        said = full
    mode = PADS.get(attributes.get("mode", "constant"))
    if mode is None:
        raise WavpruneError(f"Pad with mode={attributes['mode']!r}")
    if mode == "constant":
        fill = attributes.get("value", 0.0) if value is None else value.item()
        return functional.pad(x, torch_pads(said), value=fill)
    spatial = x.ndim - 2
    if any(said[:2]) or any(said[x.ndim : x.ndim + 2]):
        raise WavpruneError(f"Pad with mode={attributes['mode']!r} of the first two axes")
    return functional.pad(x, torch_pads([*said[2 : 2 + spatial], *said[x.ndim + 2 :]]), mode=mode)


@operator("DepthToSpace")
def _depth_to_space(attributes: Attributes, x: torch.Tensor) -> torch.Tensor:
    size = attributes["blocksize"]
    if attributes.get("mode", "DCR") == "CRD":
        return functional.pixel_shuffle(x, size)
    n, c, h, w = x.shape
    x = x.reshape(n, size, size, c // size**2, h, w).permute(0, 3, 4, 1, 5, 2)
    return x.reshape(n, c // size**2, h * size, w * size)


@operator("SpaceToDepth")
def _space_to_depth(attributes: Attributes, x: torch.Tensor) -> torch.Tensor:
    size = attributes["blocksize"]
    n, c, h, w = x.shape
    x = x.reshape(n, c, h // size, size, w // size, size).permute(0, 3, 5, 1, 2, 4)
    return x.reshape(n, c * size**2, h // size, w // size)


@operator("Resize", "Upsample")
def _resize(attributes: Attributes, x: torch.Tensor, *inputs: torch.Tensor | None) -> torch.Tensor:
    scales: list[float] | None = None
    sizes: list[int] | None = None
    given: list[Any] = list(inputs)
    if attributes["op"] == "Resize" and attributes["opset"] > 10:
        # The first is a region of interest.
        given = given[1:]
    if given and given[0] is not None and given[0].numel():
        scales = [float(n) for n in given[0].tolist()]
    elif "scales" in attributes:
        scales = list(attributes["scales"])
    if len(given) > 1 and given[1] is not None and given[1].numel():
        sizes = [int(n) for n in given[1].tolist()]
    if scales is not None and sizes is None:
        sizes = [int(size * scale) for size, scale in zip(x.shape, scales, strict=True)]
    _check_resize(attributes, x, sizes, scales)
    assert sizes is not None
    mode = attributes.get("mode", "nearest")
    # How the coordinates are computed when there are sizes alone is torch's own way too.
    factors = None if scales is None else scales[2:]
    if mode == "nearest":
        return functional.interpolate(x, sizes[2:] if factors is None else None, factors, "nearest")
    name = "bicubic" if mode == "cubic" else ("linear", "bilinear", "trilinear")[x.ndim - 3]
    corners = attributes.get("coordinate_transformation_mode") == "align_corners"
    return functional.interpolate(x, sizes[2:], None, name, align_corners=corners)


def _check_resize(
    attributes: Attributes, x: torch.Tensor, sizes: list[int] | None, scales: list[float] | None
) -> None:
    """Raise where torch would compute something else."""
    mode = attributes.get("mode", "nearest")
    place = attributes.get("coordinate_transformation_mode", "half_pixel")
    allowed = sizes is not None and sizes[:2] == list(x.shape[:2]) and x.ndim in (3, 4, 5)
    allowed &= not attributes.get("antialias", 0) and "axes" not in attributes
    if sizes is not None and mode == "nearest":
        whole = all(new % old == 0 for new, old in zip(sizes, x.shape, strict=True))
        rounding = attributes.get("nearest_mode", "round_prefer_floor")
        # By a whole factor, every one of these takes the same pixel.
        asymmetric = place == "asymmetric" and (rounding == "floor" or attributes["opset"] <= 10)
        allowed &= asymmetric or (whole and place in ("half_pixel", "pytorch_half_pixel"))
    elif sizes is not None:
        allowed &= place in ("half_pixel", "pytorch_half_pixel", "align_corners")
        allowed &= mode == "linear" or attributes.get("cubic_coeff_a", -0.75) == -0.75
        exact = scales is None or all(
            size * scale == new for size, scale, new in zip(x.shape, scales, sizes, strict=True)
        )
        allowed &= exact and not attributes.get("exclude_outside", 0)
    if not allowed:
        raise WavpruneError(
            f"{attributes['op']} with mode={mode!r}, coordinate_transformation_mode={place!r}"
        )
