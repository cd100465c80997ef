"""Builds the optional extension ``wavprune._C``; without a compiler the package installs anyway.

Where a CUDA toolkit is found, by ``CUDA_HOME`` or ``nvcc`` on the path, the extension has a CUDA
part too, whether or not this machine has a GPU. ``WAVPRUNE_NO_CUDA=1`` leaves that out,
``WAVPRUNE_NO_EXTENSION=1`` everything.
"""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup

# Torch's stable ABI of 2.10: one file for that release and all later ones.
TARGET = "-DTORCH_TARGET_VERSION=0x020a000000000000"
# No contraction into fused multiply-adds: every instruction set must give the same bits. SIMD is
# chosen at run time, so nothing here may depend on the machine that builds.
FLAGS = [
    "-std=c++20",
    "-O3",
    "-g0",
    "-fvisibility=hidden",
    "-ffp-contract=off",
    "-Wno-psabi",
    TARGET,
]
# Compute capabilities; the last one as PTX too, which later devices compile for themselves.
CAPABILITIES = (80, 90)
OLDEST_TOOLKIT = (12, 0)


def toolkit() -> Path | None:
    """The CUDA toolkit to build with, or None; says why where one that is there is left out."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    nvcc = shutil.which("nvcc", path=f"{home}/bin" if home else None)
    if nvcc is None or os.environ.get("WAVPRUNE_NO_CUDA"):
        return None

    def output(*arguments: str) -> str:
        run = subprocess.run([nvcc, *arguments], capture_output=True, text=True, check=False)
        return run.stdout + run.stderr

    release = re.search(r"release (\d+)\.(\d+)", output("--version"))
    # What is on the path may be a link or a script: nvcc itself knows where it is.
    top = re.search(r"^#\$ TOP=(.+)$", output("--dryrun", "-E", "-x", "cu", os.devnull), re.M)
    if release is None or top is None:
        print(f"wavprune: no CUDA kernels, {nvcc} says neither its release nor its place")
        return None
    if (int(release[1]), int(release[2])) < OLDEST_TOOLKIT:
        print(f"wavprune: no CUDA kernels, {nvcc} is of {release[0]}, and 12.0 is needed")
        return None
    return Path(top[1].strip()).resolve()


def gencode() -> list[str]:
    """What nvcc compiles for."""
    codes = {c: f"sm_{c}" for c in CAPABILITIES}
    newest = max(CAPABILITIES)
    codes[newest] = f"[sm_{newest},compute_{newest}]"
    return [f"-gencode=arch=compute_{c},code={code}" for c, code in codes.items()]


def add_cuda(module: Extension, home: Path, root: Path) -> None:
    """Give the extension its CUDA part."""
    from torch.utils import cpp_extension

    # Without CUDA in torch itself, it does not look for a toolkit.
    cpp_extension.CUDA_HOME = str(home)
    module.sources += sources_in(root, "cuda/*.cpp", "cuda/*.cu")
    module.include_dirs.append(str(home / "include"))
    module.library_dirs.append(str(home / "lib64"))
    # Linked in, so that the extension loads where there is no CUDA.
    module.libraries += ["cudart_static", "rt", "dl", "pthread"]
    part = f"-DWAVPRUNE_CUDA={','.join(map(str, CAPABILITIES))}"
    nvcc = ["-std=c++20", "-O3", "-fmad=false", "-Xcompiler=-fvisibility=hidden", *gencode()]
    # Both targets at a time: they take most of the time of the build.
    module.extra_compile_args = {"cxx": [*FLAGS, part], "nvcc": [*nvcc, "--threads=2", TARGET]}


def sources_in(root: Path, *patterns: str) -> list[str]:
    """Files under ``csrc``, relative to the root, always in the same order."""
    found = {path for pattern in patterns for path in (root / "csrc").glob(pattern)}
    return [str(path.relative_to(root)) for path in sorted(found)]


def extension() -> dict[str, object]:
    if os.environ.get("WAVPRUNE_NO_EXTENSION"):
        return {}
    try:
        import torch
        from torch.utils.cpp_extension import BuildExtension, CppExtension
    except ImportError:
        print("wavprune: no torch at build time, so no compiled kernels", file=sys.stderr)
        return {}
    if shutil.which(shlex.split(os.environ.get("CXX", "c++"))[0]) is None:
        print("wavprune: no C++ compiler, so no compiled kernels", file=sys.stderr)
        return {}
    root = Path(__file__).parent

    def module() -> Extension:
        return CppExtension(
            "wavprune._C",
            sources_in(root, "*.cpp", "cpu/*.cpp"),
            depends=sources_in(root, "**/*.h", "**/*.inc", "**/*.cuh"),
            extra_compile_args={"cxx": FLAGS},
            py_limited_api=True,
            optional=True,
        )

    home = toolkit() if torch.version.hip is None else None

    class OptionalBuild(BuildExtension):  # type: ignore[misc]  # torch gives it no type
        def build_extensions(self) -> None:
            if home is not None:
                (extension,) = self.extensions
                add_cuda(extension, home, root)
                # What setuptools forgives an optional extension it does not tell either.
                extension.optional = False
                try:
                    super().build_extensions()
                except Exception as error:  # whatever went wrong, the CPU part may still build
                    print(f"wavprune: no CUDA kernels, building failed: {error}", file=sys.stderr)
                    vars(extension).update(vars(module()))
                else:
                    return
            super().build_extensions()

        def run(self) -> None:
            # What setuptools forgives an optional extension is a CompileError; torch and ninja
            # raise others.
            try:
                super().run()
            except Exception as error:  # whatever went wrong, the package works without it
                print(f"wavprune: no compiled kernels, building failed: {error}", file=sys.stderr)

    build = OptionalBuild.with_options(use_ninja=shutil.which("ninja") is not None)
    return {
        "ext_modules": [module()],
        "cmdclass": {"build_ext": build},
        "options": {"bdist_wheel": {"py_limited_api": "cp311"}},
    }


if __name__ == "__main__":
    setup(**extension())
