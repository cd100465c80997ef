"""Build and load the CUDA operators for the host: ``torch.ops.wavprune_shim``."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import torch
from torch.utils.cpp_extension import include_paths, library_paths

ROOT = Path(__file__).resolve().parents[3]
SOURCES = (
    ROOT / "tests/tools/cuda_shim/shim.cpp",
    ROOT / "csrc/cuda/ops.cpp",
    ROOT / "csrc/cuda/decode.cpp",
    ROOT / "csrc/plan_tensor.cpp",
)
FLAGS = (
    *("-std=c++20", "-O1", "-g1", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off"),
    *("-Wno-psabi", "-Wall", "-Wextra", "-DTORCH_TARGET_VERSION=0x020a000000000000"),
)
SANITIZE = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer")


def header_flags() -> list[str]:
    """Where torch's headers are."""
    return [flag for path in include_paths() for flag in ("-isystem", path)]


def compiler() -> str | None:
    """The C++ compiler, where there is one."""
    return shutil.which(os.environ.get("CXX", "c++"))


def build(directory: Path, sanitize: bool = False) -> Path:
    """The library, compiled to a directory; with the sanitizers on request.

    Raises:
        RuntimeError: it does not compile, with what the compiler said.
    """
    extra = SANITIZE if sanitize else ()
    command = [compiler() or "c++", *FLAGS, *extra, *header_flags()]
    objects = [directory / f"{source.stem}.o" for source in SOURCES]
    building = [
        subprocess.Popen(
            [*command, "-c", str(source), "-o", str(target)], stderr=subprocess.PIPE, text=True
        )
        for source, target in zip(SOURCES, objects, strict=True)
    ]
    said = [process.communicate()[1] for process in building]
    if any(process.returncode for process in building):
        raise RuntimeError("\n".join(said))
    library = directory / "wavprune_shim.so"
    folders = [flag for path in library_paths() for flag in (f"-L{path}", f"-Wl,-rpath,{path}")]
    linked = ["-shared", *map(str, objects), *folders, "-ltorch_cpu", "-lc10"]
    subprocess.run([*command, *linked, "-o", str(library)], check=True)
    return library


def load(library: Path) -> None:
    """Register the operators."""
    torch.ops.load_library(str(library))  # type: ignore[no-untyped-call]  # torch's lack
