"""Builds the optional extension ``wavprune._C``; without a compiler the package installs anyway.

With a CUDA toolkit, found by ``CUDA_HOME`` or ``nvcc`` on the path, the extension has CUDA kernels
too, whether or not this machine has a GPU. ``WAVPRUNE_NO_CUDA=1`` leaves them out,
``WAVPRUNE_CUDA_CAPABILITIES=90`` (several: ``80,90``) compiles them for other devices than usual,
``WAVPRUNE_NO_EXTENSION=1`` builds nothing.
"""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup

# Torch's stable ABI of 2.10: one binary for that release and all later ones.
TARGET = "-DTORCH_TARGET_VERSION=0x020a000000000000"
# No contraction into fused multiply-adds: every instruction set must give the same bits. The
# instruction set is chosen at run time, so no flag may depend on the machine that builds.
FLAGS = [
    "-std=c++20",
    "-O3",
    "-g0",
    "-fvisibility=hidden",
    "-ffp-contract=off",
    "-Wno-psabi",
    TARGET,
]
# Compute capabilities; the last one as PTX too, from which the driver compiles for later devices.
CAPABILITIES = tuple(
    int(capability)
    for capability in os.environ.get("WAVPRUNE_CUDA_CAPABILITIES", "80,90").split(",")
)
OLDEST_TOOLKIT = (12, 0)


def toolkit() -> Path | None:
    """The CUDA toolkit to build with, or None; prints why an existing one is not used."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    nvcc = shutil.which("nvcc", path=f"{home}/bin" if home else None)
    if nvcc is None or os.environ.get("WAVPRUNE_NO_CUDA"):
        return None

    def output(*arguments: str) -> str:
        run = subprocess.run([nvcc, *arguments], capture_output=True, text=True, check=False)
        return run.stdout + run.stderr

    release = re.search(r"release (\d+)\.(\d+)", output("--version"))
    # The nvcc on the path may be a link or a script; nvcc itself knows its directory.
    top = re.search(r"^#\$ TOP=(.+)$", output("--dryrun", "-E", "-x", "cu", os.devnull), re.M)
    if release is None or top is None:
        print(f"wavprune: no CUDA kernels, {nvcc} does not report its release and directory")
        return None
    if (int(release[1]), int(release[2])) < OLDEST_TOOLKIT:
        print(f"wavprune: no CUDA kernels, {nvcc} is {release[0]}; 12.0 or later is needed")
        return None
    return Path(top[1].strip()).resolve()


def gencode() -> list[str]:
    """The architectures that nvcc compiles for."""
    codes = {c: f"sm_{c}" for c in CAPABILITIES}
    newest = max(CAPABILITIES)
    codes[newest] = f"[sm_{newest},compute_{newest}]"
    return [f"-gencode=arch=compute_{c},code={code}" for c, code in codes.items()]


def add_cuda(module: Extension, home: Path, root: Path) -> None:
    """Add the CUDA kernels to the extension."""
    from torch.utils import cpp_extension

    # A torch without CUDA does not look for a toolkit.
    cpp_extension.CUDA_HOME = str(home)
    module.sources += sources_in(root, "cuda/*.cpp", "cuda/*.cu")
    module.include_dirs.append(str(home / "include"))
    module.library_dirs.append(str(home / "lib64"))
    # Linked statically, so that the extension loads without CUDA.
    module.libraries += ["cudart_static", "rt", "dl", "pthread"]
    capabilities = f"-DWAVPRUNE_CUDA={','.join(map(str, CAPABILITIES))}"
    nvcc = ["-std=c++20", "-O3", "-fmad=false", "-Xcompiler=-fvisibility=hidden", *gencode()]
    # Both targets in parallel: they take most of the build.
    module.extra_compile_args = {
        "cxx": [*FLAGS, capabilities],
        "nvcc": [*nvcc, "--threads=2", TARGET],
    }


def sources_in(root: Path, *patterns: str) -> list[str]:
    """Files under ``csrc``, relative to the root, sorted."""
    paths = {path for pattern in patterns for path in (root / "csrc").glob(pattern)}
    return [str(path.relative_to(root)) for path in sorted(paths)]


def extension() -> dict[str, object]:
    if os.environ.get("WAVPRUNE_NO_EXTENSION"):
        return {}
    try:
        import torch
        from torch.utils.cpp_extension import BuildExtension, CppExtension
    except ImportError:
        print("wavprune: no compiled extension, there is no torch at build time", file=sys.stderr)
        return {}
    if shutil.which(shlex.split(os.environ.get("CXX", "c++"))[0]) is None:
        print("wavprune: no compiled extension, there is no C++ compiler", file=sys.stderr)
        return {}
    root = Path(__file__).parent

    def module() -> Extension:
        return CppExtension(
            "wavprune._C",
            sources_in(root, "*.cpp", "cpu/*.cpp", "coding/*.cpp"),
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
                # setuptools would hide the failure of an optional extension.
                extension.optional = False
                try:
                    super().build_extensions()
                except Exception as error:  # the CPU's operators may still build
                    print(f"wavprune: no CUDA kernels, building failed: {error}", file=sys.stderr)
                    vars(extension).update(vars(module()))
                else:
                    return
            super().build_extensions()

        def run(self) -> None:
            # setuptools ignores the CompileError of an optional extension; torch and ninja raise
            # other errors.
            try:
                super().run()
            except Exception as error:  # the package works without it
                print(f"wavprune: no compiled extension: {error}", file=sys.stderr)

    build = OptionalBuild.with_options(use_ninja=shutil.which("ninja") is not None)
    return {
        "ext_modules": [module()],
        "cmdclass": {"build_ext": build},
        "options": {"bdist_wheel": {"py_limited_api": "cp311"}},
    }


if __name__ == "__main__":
    setup(**extension())
