"""Damaged files under the decoder in C: ``python tests/tools/fuzz_decoder.py SECONDS``.

With clang libFuzzer makes them, and keeps what it finds in ``build/fuzz``; without, files of the
tests are changed at random. ``tests/decoder`` does the latter for a few seconds.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

# As a script it finds the rest of the tests.
sys.path.insert(0, str(Path(__file__).parents[2]))
from tests.decoder.test_decoder import FILES, MUTATE
from tests.support import decoder
from wavprune import checkpoint

# Larger ones take long to change.
LARGEST_SEED = 1 << 14
MUTATIONS_A_SECOND = 1000


def seeds(folder: Path) -> list[Path]:
    """The portable files of the tests, and the bytes of their tensors alone."""
    written = []
    for number, make in enumerate(FILES.values()):
        with tempfile.TemporaryDirectory() as scratch:
            path = folder / f"{number}.safetensors"
            checkpoint.portable(make(Path(scratch)), path)
        data = path.read_bytes()
        if len(data) > LARGEST_SEED:
            path.unlink()
            continue
        path.with_suffix(".block").write_bytes(data[8 + int.from_bytes(data[:8], "little") :])
        written.append(path)
    return written


def main() -> int:
    """Build, run, and return the exit status."""
    seconds = int(sys.argv[1]) if len(sys.argv) > 1 else 60
    folder = decoder.ROOT / "build" / "fuzz"
    (folder / "corpus").mkdir(parents=True, exist_ok=True)
    files = seeds(folder / "corpus")
    sources = [decoder.FUZZ, decoder.SOURCE]
    clang = shutil.which(os.environ.get("CLANG", "clang"))
    if clang is None:
        print("there is no clang here: files are changed at random")
        program = decoder.compile_(folder / "mutate", sources, [*decoder.SANITIZERS, *MUTATE])
        runs = str(seconds * MUTATIONS_A_SECOND)
        command = [str(program), runs, str(os.getpid()), *map(str, files)]
        return subprocess.run(command, check=False).returncode
    decoder.COMPILER = clang
    flags = [*decoder.SANITIZERS, "-fsanitize=fuzzer", MUTATE[1]]
    program = decoder.compile_(folder / "fuzz", sources, flags)
    command = [str(program), f"-max_total_time={seconds}", f"-max_len={LARGEST_SEED}", "corpus"]
    return subprocess.run(command, cwd=folder, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
