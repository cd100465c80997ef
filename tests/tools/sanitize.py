"""Run the compiled code under AddressSanitizer and UndefinedBehaviorSanitizer: ``make sanitize``.

First the passes over tiles (``csrc/cpu/passes*``), for every instruction set of this processor and
tails of every length, in buffers of exactly the size of the data; then the CUDA kernels on the host
(``test_cuda.py``, ``test_on_device.py``), with shared memory of exactly the size of each launch.
Exit status 1 if a sanitizer or a check fails.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FLAGS = [
    *("-std=c++20", "-O1", "-g", "-fno-omit-frame-pointer", "-ffp-contract=off", "-Wno-psabi"),
    *("-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-Wall", "-Wextra"),
]
HOST_FILES = ("backends/test_cuda.py", "checkpoint/test_on_device.py")
# Any bytes at all, with tables in every place.
DECODING_TESTS = "TestAnyBytes or anywhere or checksum_of_several"
# Every CUDA kernel, shape, layout and edge case once; the other tests only check values. Masks in
# every layout: of float32 and bfloat16.
HOST_TESTS = (
    "random or strides or finite or length or nothing or sym4 or db2"
    " or (masks and not (every_layout and (dtype1 or dtype2)))"
)


def main() -> int:
    """Compile and run everything; the exit status."""
    compiler = os.environ.get("CXX", "c++")
    if shutil.which(compiler) is None:
        print("sanitize: skipped, there is no C++ compiler here")
        return 0
    sources = [
        *sorted(ROOT.glob("csrc/cpu/passes_*.cpp")),
        ROOT / "tests" / "tools" / "sanitize_passes.cpp",
    ]
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
        failed = subprocess.run([program], check=False).returncode
    return failed or cuda_on_the_host(compiler)


def cuda_on_the_host(compiler: str) -> int:
    """Run the tests of the CUDA kernels in fibers, with the sanitizers in torch's process."""
    if importlib.util.find_spec("wavprune._C") is None:
        print("sanitize: CUDA kernels skipped, the compiled extension is not built here")
        return 0
    # The sanitizers' runtimes must be loaded first, and libstdc++ with them, so that they intercept
    # what throws exceptions.
    runtimes = [
        subprocess.run(
            [compiler, f"-print-file-name={name}"], capture_output=True, text=True, check=True
        ).stdout.strip()
        for name in ("libasan.so", "libubsan.so", "libstdc++.so")
    ]
    environment = {
        **os.environ,
        "WAVPRUNE_SANITIZE": "1",
        "LD_PRELOAD": ":".join(runtimes),
        # Python frees little at exit, and the sanitizer does not know the stacks of the fibers.
        "ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=0",
        "OMP_NUM_THREADS": "1",
    }
    tests = [str(ROOT / "tests" / name) for name in HOST_FILES]
    # Nothing captured: a sanitizer that fails ends the process at once.
    command = [sys.executable, "-m", "pytest", "-qs", "-p", "no:cacheprovider", *tests]
    return subprocess.run(
        [*command, "-k", f"(TestOnTheHost and ({HOST_TESTS})) or {DECODING_TESTS}"],
        env=environment,
        cwd=ROOT,
        check=False,
    ).returncode


if __name__ == "__main__":
    sys.exit(main())
