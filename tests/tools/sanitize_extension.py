"""Run the whole compiled extension under sanitizers, in Python: a part of ``make sanitize``.

The tests of the operators run under AddressSanitizer and UndefinedBehaviorSanitizer, and one
prune of every kind on several threads under ThreadSanitizer. Exit status 1 if one finds something.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

import torch
from torch.utils import cpp_extension

ROOT = Path(__file__).resolve().parents[2]
FLAGS = [
    *("-std=c++20", "-O1", "-g1", "-fPIC", "-fno-omit-frame-pointer", "-ffp-contract=off"),
    *("-Wno-psabi", "-DTORCH_TARGET_VERSION=0x020a000000000000", "-DPy_LIMITED_API=0x030A0000"),
]
TESTS = [
    f"tests/{name}.py"
    for name in (
        *("backends/test_native", "test_ops", "test_fast"),
        *("checkpoint/test_trellis", "checkpoint/test_checksum"),
    )
]
# These measure; a sanitizer's own memory and time would be measured too.
LEFT_OUT = "not memory"

RACES = """
import torch
import wavprune
from wavprune import _C
print(_C.__file__)
torch.set_num_threads(4)
torch.manual_seed(0)
for dtype in (torch.float32, torch.float64, torch.bfloat16):
    for memory_format in (torch.contiguous_format, torch.channels_last):
        net = torch.nn.Sequential(
            torch.nn.Conv2d(64, 320, 3), torch.nn.Conv2d(320, 70, 5), torch.nn.Conv2d(70, 900, 1)
        ).to(dtype, memory_format=memory_format)
        pruner = wavprune.Pruner(net, wavprune.PruneConfig(sparsity=0.3, backend="native"))
        pruner.step()
        pruner.step()
        for settings in (
            {},
            {"wavelet": "haar"},
            {"wavelet": "klt"},
            {"scope": "global"},
            {"method": "random"},
            {"percentile": 50.0, "wavelet": "haar"},
        ):
            wavprune.fast.prune(net, backend="native", **settings)
"""


def build(compiler: str, sanitizers: str, folder: Path) -> Path:
    """Compile the extension; the folder of a package ``wavprune`` that has it."""
    package = folder / "package" / "wavprune"
    package.mkdir(parents=True)
    for path in (ROOT / "src" / "wavprune").iterdir():
        if path.suffix != ".so" and path.name != "__pycache__":
            (package / path.name).symlink_to(path)
    include = [f"-I{path}" for path in cpp_extension.include_paths()]
    include.append(f"-I{sysconfig.get_paths()['include']}")
    flags = [*FLAGS, f"-fsanitize={sanitizers}", "-fno-sanitize-recover=all"]
    sources = sorted(
        path for part in ("", "cpu/", "coding/") for path in ROOT.glob(f"csrc/{part}*.cpp")
    )
    waiting = [
        [compiler, *flags, *include, "-c", str(source), "-o", str(folder / f"{source.stem}.o")]
        for source in sources
    ]
    objects = [command[-1] for command in waiting]
    running: list[subprocess.Popen[bytes]] = []
    while waiting or running:
        while waiting and len(running) < (os.cpu_count() or 1):
            running.append(subprocess.Popen(waiting.pop()))
        if running.pop(0).wait():
            sys.exit(1)
    library = Path(torch.__file__).parent / "lib"
    linked = ["-shared", f"-L{library}", "-ltorch", "-ltorch_cpu", "-lc10"]
    subprocess.run(
        [compiler, *flags, *objects, *linked, "-o", str(package / "_C.abi3.so")], check=True
    )
    return package.parent


def run(compiler: str, package: Path, runtimes: list[str], command: list[str]) -> int:
    """Run Python with the package and with the sanitizers' runtimes; its exit status."""
    # They must be loaded first, and libstdc++ with them, to intercept what throws exceptions.
    found = [
        subprocess.run(
            [compiler, f"-print-file-name={name}"], capture_output=True, text=True, check=True
        ).stdout.strip()
        for name in [*runtimes, "libstdc++.so"]
    ]
    environment = {
        **os.environ,
        "LD_PRELOAD": ":".join(found),
        "PYTHONPATH": str(package),
        "ASAN_OPTIONS": "detect_leaks=0",
        # Python and torch are not instrumented.
        "TSAN_OPTIONS": "ignore_noninstrumented_modules=1:halt_on_error=1",
    }
    return subprocess.run(command, env=environment, cwd=ROOT, check=False).returncode


def main() -> int:
    """Compile and run everything; the exit status."""
    compiler = os.environ.get("CXX", "c++")
    if sys.platform != "linux" or shutil.which(compiler) is None:
        print("sanitize: the extension skipped, there is no C++ compiler for Linux here")
        return 0
    with tempfile.TemporaryDirectory() as directory:
        package = build(compiler, "address,undefined", Path(directory))
        pytest = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
        runtimes = ["libasan.so", "libubsan.so"]
        if run(compiler, package, runtimes, [*pytest, *TESTS, "-k", LEFT_OUT]):
            return 1
    with tempfile.TemporaryDirectory() as directory:
        package = build(compiler, "thread", Path(directory))
        # ThreadSanitizer wants memory where it was before addresses were drawn at random.
        fixed = ["setarch", "-R"] if shutil.which("setarch") else []
        return run(compiler, package, ["libtsan.so"], [*fixed, sys.executable, "-c", RACES])


if __name__ == "__main__":
    sys.exit(main())
