"""Builds the optional extension ``wavprune._C``; without a compiler the package installs anyway."""

import os
import shlex
import shutil
import sys
from pathlib import Path

from setuptools import setup

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


def extension() -> dict[str, object]:
    if os.environ.get("WAVPRUNE_NO_EXTENSION"):
        return {}
    try:
        from torch.utils.cpp_extension import BuildExtension, CppExtension
    except ImportError:
        print("wavprune: no torch at build time, so no compiled kernels", file=sys.stderr)
        return {}
    if shutil.which(shlex.split(os.environ.get("CXX", "c++"))[0]) is None:
        print("wavprune: no C++ compiler, so no compiled kernels", file=sys.stderr)
        return {}
    root = Path(__file__).parent
    sources = [str(path.relative_to(root)) for path in sorted(root.glob("csrc/**/*.cpp"))]
    headers = [str(path.relative_to(root)) for path in sorted(root.glob("csrc/**/*.[hi]*"))]
    module = CppExtension(
        "wavprune._C",
        sources,
        depends=headers,
        extra_compile_args={"cxx": FLAGS},
        py_limited_api=True,
        optional=True,
    )

    class OptionalBuild(BuildExtension):  # type: ignore[misc]  # torch gives it no type
        def run(self) -> None:
            # What setuptools forgives an optional extension is a CompileError; torch and ninja
            # raise others.
            try:
                super().run()
            except Exception as error:  # whatever went wrong, the package works without it
                print(f"wavprune: no compiled kernels, building failed: {error}", file=sys.stderr)

    build = OptionalBuild.with_options(use_ninja=shutil.which("ninja") is not None)
    return {
        "ext_modules": [module],
        "cmdclass": {"build_ext": build},
        "options": {"bdist_wheel": {"py_limited_api": "cp311"}},
    }


setup(**extension())
