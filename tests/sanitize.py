"""Build the compiled kernels under AddressSanitizer and UndefinedBehaviorSanitizer and run them.

``make sanitize``: the passes over tiles (``csrc/cpu/passes*.cpp``), for every instruction set of
this processor, on tails of every length, in buffers that end where the data ends. Exit status 1
where a sanitizer or a check objects.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FLAGS = [
    *("-std=c++20", "-O1", "-g", "-fno-omit-frame-pointer", "-ffp-contract=off", "-Wno-psabi"),
    *("-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-Wall", "-Wextra"),
]


def main() -> int:
    """Compile, run, and report."""
    compiler = os.environ.get("CXX", "c++")
    if shutil.which(compiler) is None:
        print("sanitize: skipped, there is no C++ compiler here")
        return 0
    sources = [*sorted(ROOT.glob("csrc/cpu/passes_*.cpp")), ROOT / "tests" / "sanitize_passes.cpp"]
    with tempfile.TemporaryDirectory() as directory:
        objects = [Path(directory) / f"{source.stem}.o" for source in sources]
        building = [
            subprocess.Popen([compiler, *FLAGS, "-c", str(source), "-o", str(target)])
            for source, target in zip(sources, objects, strict=True)
        ]
        if any(process.wait() for process in building):
            return 1
        program = str(Path(directory) / "passes")
        subprocess.run([compiler, *FLAGS, *map(str, objects), "-o", program], check=True)
        return subprocess.run([program], check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
