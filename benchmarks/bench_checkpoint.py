"""Compressed checkpoints and the alternatives: ``python -m benchmarks.bench_checkpoint``.

Prints Markdown tables: bytes, bits per weight, the change of the network's outputs, and the speed
of encoding and decoding, best of three. NNCodec (an ISO/IEC 15938-17 coder) has rows if it is
installed: ``pip install nncodec``.
"""

from __future__ import annotations

import copy
import importlib
import io
import math
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import redirect_stdout
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import zstandard
from safetensors.torch import load, save
from torch import nn

import wavprune
from wavprune import PruneConfig, checkpoint, demo

from .networks import efficientnet_lite0

State = Mapping[str, torch.Tensor]
CROPS, PIXELS = 32, 224
MEAN, SPREAD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
STEPS = (2e-4, 3.5e-4, 5e-4, 7e-4)
QPS = (-36, -33, -30, -28)
ROUNDS = 3
LEVEL = 19
EVERYTHING = ("*",)


class Row(NamedTuple):
    """One way to store a network.

    Attributes:
        name: its label in the tables.
        encode: from a state dict to bytes.
        decode: from bytes to a state dict.
    """

    name: str
    encode: Callable[[State], bytes]
    decode: Callable[[bytes], State]


class Result(NamedTuple):
    """Size, change of the outputs, and speed in million weights per second."""

    name: str
    bytes: int
    bits: float
    kl: float
    agreement: float
    encode: float
    decode: float


def main() -> None:
    torch.set_num_threads(1)
    network = efficientnet_lite0().eval()
    images = crops()
    lite(network, images)
    bases("EfficientNet-Lite0's spatial layers", network, spatial(network))
    for seed in demo.SEEDS[:1]:
        net = demo.resnet(seed)
        bases("The demo ResNet's spatial layers", net, spatial(net))
    digits()


def lite(network: nn.Module, images: torch.Tensor) -> None:
    """Compare all ways to store EfficientNet-Lite0."""
    state = network.state_dict()
    before = outputs(network, images)
    rows = [*ours(), *plain(), *nncodec()]
    results = []
    for row in rows:
        coded, encode = timed(partial(row.encode, state))
        decoded, decode = timed(partial(row.decode, coded))
        other = copy.deepcopy(network)
        other.load_state_dict({name: decoded.get(name, state[name]) for name in state})
        after = outputs(other, images)
        elements = sum(tensor.numel() for tensor in state.values())
        results.append(
            Result(
                row.name,
                len(coded),
                8 * len(coded) / elements,
                divergence(before, after),
                float((before.argmax(1) == after.argmax(1)).float().mean()),
                elements / encode / 1e6,
                elements / decode / 1e6,
            )
        )
        show_progress(row.name)
    print(f"\n### EfficientNet-Lite0, {CROPS} crops of two photographs\n")
    table(
        ("stored as", "bytes", "bits per weight", "KL", "agreement", "encode M/s", "decode M/s"),
        [
            (
                r.name,
                f"{r.bytes:,}",
                f"{r.bits:.2f}",
                f"{r.kl:.4f}",
                f"{r.agreement:.0%}",
                f"{r.encode:.1f}",
                f"{r.decode:.0f}",
            )
            for r in results
        ],
    )
    against_nncodec(results)


def against_nncodec(results: list[Result]) -> None:
    """Compare bytes at the KL divergence of each row of NNCodec, interpolated between ours."""
    own = sorted((math.log(r.kl), math.log(r.bytes)) for r in results if r.name.startswith("step"))
    theirs = [r for r in results if r.name.startswith("NNCodec")]
    if not theirs:
        return
    mine = [r for r in results if r.name.startswith("step")]
    print("\n### At the KL of NNCodec\n")
    rows = []
    for r in theirs:
        if not own[0][0] <= math.log(r.kl) <= own[-1][0]:
            continue
        size = bytes_at(math.log(r.kl), own)
        rows.append(
            (r.name, f"{r.kl:.4f}", f"{r.bytes:,}", f"{size:,.0f}", f"{size / r.bytes:.3f}")
        )
    table(("", "KL", "its bytes", "wavprune's", "ratio"), rows)
    encode = np.median([r.encode for r in mine]) / np.median([r.encode for r in theirs])
    decode = np.median([r.decode for r in mine]) / np.median([r.decode for r in theirs])
    print(f"\nEncoding is {encode:.0f} times as fast, decoding {decode:.0f} times (medians).")


def bytes_at(log_error: float, points: list[tuple[float, float]]) -> float:
    """Bytes at an error, interpolated between points ``(log(error), log(bytes))``."""
    log_errors, log_bytes = (np.array(column) for column in zip(*points, strict=True))
    return math.exp(float(np.interp(log_error, log_errors, log_bytes)))


def ours() -> Iterator[Row]:
    def row(name: str, **how: Any) -> Row:
        return Row(name, partial(saved, **how), loaded)

    for step in STEPS:
        yield row(f"step {step:g}", step=step, targets=EVERYTHING)
    yield row("8 bits", bits=8, targets=EVERYTHING)
    half = PruneConfig(sparsity=0.5, wavelet="auto", targets=EVERYTHING, ignore=("_fc",))
    yield row("auto, half of the convolutions pruned, 8 bits", config=half)


def plain() -> Iterator[Row]:
    def squeezed(data: bytes) -> bytes:
        return zstandard.ZstdCompressor(level=LEVEL).compress(data)

    def unsqueezed(data: bytes) -> State:
        return load(zstandard.ZstdDecompressor().decompress(data))

    yield Row(f"safetensors + zstd -{LEVEL}", lambda state: squeezed(save(dict(state))), unsqueezed)
    yield Row("min-weight, half pruned, bitmask + float16", bitmask, from_bitmask)
    yield Row(
        f"min-weight, half pruned, 8 bits + zstd -{LEVEL}",
        lambda state: squeezed(save(eight_bits(state))),
        lambda data: from_eight_bits(unsqueezed(data)),
    )


def nncodec() -> Iterator[Row]:
    try:
        with redirect_stdout(io.StringIO()):
            library = importlib.import_module("nncodec.nn")
    except ImportError as error:
        print(f"no rows of NNCodec: {error}", file=sys.stderr)
        return
    directory = tempfile.mkdtemp()

    def row(qp: int) -> Row:
        def encode(state: State) -> bytes:
            arrays = {name: t.numpy().copy() for name, t in state.items() if t.ndim}
            settings = {"qp": qp, "verbose": False, "results": directory}
            with redirect_stdout(io.StringIO()):
                return bytes(library.encode(arrays, settings))

        def decode(data: bytes) -> State:
            with redirect_stdout(io.StringIO()):
                arrays = library.decode(bytearray(data), {"verbose": False})
            return {name: torch.as_tensor(np.asarray(array)) for name, array in arrays.items()}

        return Row(f"NNCodec qp {qp}", encode, decode)

    yield from map(row, QPS)


def saved(state: State, **how: Any) -> bytes:
    with tempfile.TemporaryDirectory() as directory:
        report = checkpoint.save(state, Path(directory, "x.safetensors"), **how)
        return report.path.read_bytes()


def loaded(data: bytes) -> State:
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory, "x.safetensors")
        path.write_bytes(data)
        return checkpoint.load(path)


def halved(weight: torch.Tensor) -> torch.Tensor:
    """A weight with the smaller half of its values set to 0."""
    conv = nn.Conv2d(1, 1, 1)
    conv.weight = nn.Parameter(weight.clone(), requires_grad=False)
    wavprune.fast.prune(conv, method="min_weight", sparsity=0.5)
    return conv.weight.detach()


def bitmask(state: State) -> bytes:
    stored = {}
    for name, tensor in state.items():
        if tensor.ndim == 4:
            pruned = halved(tensor)
            kept = pruned != 0
            stored[f"{name}.mask"] = torch.from_numpy(np.packbits(kept.numpy()))
            stored[f"{name}.values"] = pruned[kept].half()
            stored[f"{name}.shape"] = torch.tensor(tensor.shape)
        else:
            stored[name] = tensor.half() if tensor.ndim == 2 else tensor
    return save(stored)


def from_bitmask(data: bytes) -> State:
    stored = load(data)
    state = {}
    for name, tensor in stored.items():
        if name.endswith(".mask"):
            name = name.removesuffix(".mask")
            shape = stored[f"{name}.shape"].tolist()
            bits = np.unpackbits(tensor.numpy(), count=math.prod(shape)).astype(bool)
            weight = torch.zeros(shape)
            weight.view(-1)[torch.from_numpy(bits)] = stored[f"{name}.values"].float()
            state[name] = weight
        elif not name.endswith((".values", ".shape")):
            state[name] = tensor.float() if tensor.is_floating_point() else tensor
    return state


def eight_bits(state: State) -> dict[str, torch.Tensor]:
    stored = {}
    for name, tensor in state.items():
        if tensor.ndim in (2, 4):
            weight = halved(tensor) if tensor.ndim == 4 else tensor
            rows = weight.flatten(1)
            scale = rows.abs().amax(1).clamp_min(1e-12) / 127
            stored[f"{name}.scale"] = scale
            stored[f"{name}.symbols"] = (
                (rows / scale[:, None]).round().to(torch.int8).view(weight.shape)
            )
        else:
            stored[name] = tensor
    return stored


def from_eight_bits(stored: State) -> State:
    state = {}
    for name, tensor in stored.items():
        if name.endswith(".symbols"):
            name = name.removesuffix(".symbols")
            scale = stored[f"{name}.scale"].view(-1, *[1] * (tensor.ndim - 1))
            state[name] = tensor.float() * scale
        elif not name.endswith(".scale"):
            state[name] = tensor
    return state


def bases(title: str, network: nn.Module, layers: list[str]) -> None:
    """Compare the identity basis and the best basis of each layer, at equal weight error."""
    print(f"\n### {title}: bytes of the layers at equal weight error\n")
    rows = []
    for step in (4e-4, 1e-3, 2.5e-3, 6e-3, 1.5e-2):
        points = {}
        for wavelet in ("identity", "auto"):
            reports = [
                save_report(network, step * factor, wavelet, layers) for factor in (0.9, 1.0, 1.1)
            ]
            points[wavelet] = sorted(
                (math.log(r.relative_error), math.log(sum(layer.bytes for layer in r.layers)))
                for r in reports
            )
        at = points["identity"][1][0]
        sizes = {name: bytes_at(at, line) for name, line in points.items()}
        saving = 1 - sizes["auto"] / sizes["identity"]
        weights = reports[0].numel
        rows.append(
            (
                f"{math.exp(at):.4f}",
                *(f"{sizes[name]:,.0f} ({8 * sizes[name] / weights:.2f})" for name in sizes),
                f"{saving:.1%}",
            )
        )
        show_progress(f"{title} {step:g}")
    table(("relative error", "identity (bits per weight)", "auto (bits per weight)", "saved"), rows)


def save_report(
    network: nn.Module, step: float, wavelet: str, layers: list[str]
) -> checkpoint.SaveReport:
    with tempfile.TemporaryDirectory() as directory:
        return checkpoint.save(
            network, Path(directory, "x.safetensors"), step=step, wavelet=wavelet, targets=layers
        )


def digits() -> None:
    """Compare bytes and accuracy of the demo ResNet."""
    images, labels = (torch.cat(batches) for batches in zip(*demo.digits("test"), strict=True))
    network = demo.resnet(0)
    state = network.state_dict()
    before = outputs(network, images)
    print("\n### The demo ResNet, 600 test images\n")
    rows = [("float32 safetensors", len(save(dict(state))), before)]
    ways: dict[str, dict[str, Any]] = {
        "8 bits": {"bits": 8},
        "4 bits": {"bits": 4},
        "step 0.004": {"step": 4e-3},
        "step 0.01": {"step": 1e-2},
        "step 0.01, identity": {"step": 1e-2, "wavelet": "identity"},
    }
    own = [
        Row(name, partial(saved, targets=EVERYTHING, **how), loaded) for name, how in ways.items()
    ]
    for row in (*own, *plain(), *nncodec()):
        data = row.encode(state)
        decoded = row.decode(data)
        other = copy.deepcopy(network)
        other.load_state_dict({key: decoded.get(key, state[key]) for key in state})
        rows.append((row.name, len(data), outputs(other, images)))
        show_progress(row.name)
    table(
        ("stored as", "bytes", "KL", "accuracy"),
        [
            (
                name,
                f"{size:,}",
                f"{divergence(before, after):.4f}",
                f"{float((after.argmax(1) == labels).float().mean()):.1%}",
            )
            for name, size, after in rows
        ],
    )


def spatial(network: nn.Module) -> list[str]:
    return [
        name
        for name, module in network.named_modules()
        if isinstance(module, nn.Conv2d) and module.kernel_size != (1, 1)
    ]


def crops() -> torch.Tensor:
    """Seeded random crops of scikit-learn's two photographs, normalized as for ImageNet."""
    from sklearn.datasets import load_sample_images

    photographs = [
        torch.from_numpy(np.array(i)).permute(2, 0, 1) for i in load_sample_images().images
    ]
    generator = torch.Generator().manual_seed(0)
    images = []
    for i in range(CROPS):
        image = photographs[i % len(photographs)].float() / 255
        height, width = image.shape[1:]
        side = int(torch.randint(160, min(height, width), (), generator=generator))
        top = int(torch.randint(0, height - side, (), generator=generator))
        left = int(torch.randint(0, width - side, (), generator=generator))
        crop = image[None, :, top : top + side, left : left + side]
        images.append(
            nn.functional.interpolate(crop, (PIXELS, PIXELS), mode="bilinear", antialias=True)
        )
    mean, spread = (torch.tensor(values).view(3, 1, 1) for values in (MEAN, SPREAD))
    return (torch.cat(images) - mean) / spread


@torch.no_grad()
def outputs(network: nn.Module, images: torch.Tensor) -> torch.Tensor:
    return torch.cat([network(batch) for batch in torch.split(images, 16)])


def divergence(before: torch.Tensor, after: torch.Tensor) -> float:
    """Mean Kullback-Leibler divergence of the outputs, in nats; at least 1e-12."""
    p, q = before.double().log_softmax(1), after.double().log_softmax(1)
    return max(float((p.exp() * (p - q)).sum(1).mean()), 1e-12)


def timed(run: Callable[[], Any]) -> tuple[Any, float]:
    best = math.inf
    for _ in range(ROUNDS):
        start = time.perf_counter()
        result = run()
        best = min(best, time.perf_counter() - start)
        if best > 2:
            break
    return result, best


def table(head: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> None:
    print("| " + " | ".join(head) + " |")
    print("|" + "---|" + "---:|" * (len(head) - 1))
    for row in rows:
        print("| " + " | ".join(row) + " |")
    sys.stdout.flush()


def show_progress(what: str) -> None:
    print(f"done: {what}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
