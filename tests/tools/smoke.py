"""Use an installed wavprune as a user would; part of ``make release-check``."""

import subprocess
import sys
import tempfile
from pathlib import Path

import numpy
import torch

import wavprune
from wavprune import checkpoint


def wavprune_command(*arguments: str) -> str:
    """What a command prints."""
    command = [sys.executable, "-m", "wavprune", *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def main() -> None:
    """Prune in compiled code as in PyWavelets, store, load, and run commands."""
    assert "site-packages" in str(wavprune.__file__), wavprune.__file__
    fast, reference = wavprune.demo.resnet(), wavprune.demo.resnet()
    report = wavprune.fast.prune(fast, wavelet="haar", sparsity=0.8)
    assert {layer.backend for layer in report} == {"native"}, report
    expected = wavprune.reference.prune(reference, wavelet="haar", sparsity=0.8)
    # Coefficients within rounding of a threshold may differ, few of 76,432.
    assert abs(report.kept - expected.kept) <= 4, (report.kept, expected.kept)
    pairs = zip(fast.parameters(), reference.parameters(), strict=True)
    differ = sum(int((~torch.isclose(a, b, atol=1e-6)).sum()) for a, b in pairs)
    assert differ <= 36, differ
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "small.safetensors"
        saved = checkpoint.save(fast, path, bits=8)
        assert checkpoint.load(path).keys() == fast.state_dict().keys()
        assert "layer1.conv1" in wavprune_command(
            "inspect", str(wavprune.demo.weights_path("resnet", 0))
        )
    assert wavprune_command("--version").split()[-1] == wavprune.__version__
    versions = f"Python {sys.version.split()[0]}, torch {torch.__version__}"
    print(f"{versions}, numpy {numpy.__version__}: {report.sparsity:.1%}, {saved.bytes:,} bytes")


if __name__ == "__main__":
    main()
