"""Builds the optional extension ``wavprune._C``; without a compiler the package installs anyway.

Torch is not needed: ``csrc/torch`` has the headers of its stable ABI, and the functions behind them
are found in the torch that a program has loaded. With a CUDA toolkit, found by ``CUDA_HOME`` or
``nvcc`` on the path, the extension has CUDA kernels too, whether or not this machine has a GPU.
``WAVPRUNE_NO_CUDA=1`` leaves them out, ``WAVPRUNE_CUDA_CAPABILITIES=90`` (several: ``80,90``)
compiles them for other devices than usual, ``WAVPRUNE_NO_EXTENSION=1`` builds nothing, and
``MAX_JOBS=1`` compiles one file at a time.
"""

import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

ROOT = Path(__file__).resolve().parent
# Torch's stable ABI of 2.10 and Python's of 3.11: one binary for these releases and all later ones.
TARGETS = ["-DTORCH_TARGET_VERSION=0x020a000000000000", "-DPy_LIMITED_API=0x030B0000"]
# No contraction into fused multiply-adds: every instruction set must give the same bits. The
# instruction set is chosen at run time, so no flag may depend on the machine that builds.
FLAGS = [
    "-std=c++20",
    "-O3",
    "-g0",
    "-DNDEBUG",
    "-fPIC",
    "-fwrapv",
    "-fvisibility=hidden",
    "-ffp-contract=off",
    "-Wno-psabi",
    *TARGETS,
]
INCLUDES = [
    *("-isystem", str(ROOT / "csrc/torch"), "-isystem", sysconfig.get_path("include")),
]
# Compute capabilities; the last one as PTX too, from which the driver compiles for later devices.
CAPABILITIES = tuple(
    int(capability)
    for capability in os.environ.get("WAVPRUNE_CUDA_CAPABILITIES", "80,90").split(",")
)
OLDEST_TOOLKIT = (12, 0)
STUB = "libtorch_cpu.so"


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


def sources_in(*patterns: str) -> list[str]:
    """Files under ``csrc``, relative to the root, sorted."""
    paths = {path for pattern in patterns for path in (ROOT / "csrc").glob(pattern)}
    return [str(path.relative_to(ROOT)) for path in sorted(paths)]


def environment(name: str, default: str = "") -> list[str]:
    """The words of an environment variable."""
    return shlex.split(os.environ.get(name) or default)


def escaped(path: str | Path) -> str:
    """A path as ninja reads it."""
    return re.sub(r"([$ :])", r"$\1", str(path))


class Commands(NamedTuple):
    """What compiles and links; the output and the inputs follow.

    Attributes:
        cxx: of the host's compiler.
        nvcc: of CUDA's; empty without it.
        stub: makes an empty library of torch's name; None where the linker needs none.
        link: of the extension.
        libraries: that follow the objects.
        sources: what is compiled.
    """

    cxx: list[str]
    nvcc: list[str]
    stub: list[str] | None
    link: list[str]
    libraries: list[str]
    sources: list[str]

    def compile(self, source: str) -> list[str]:
        """The command for a source."""
        return self.nvcc if source.endswith(".cu") else self.cxx


def commands(home: Path | None) -> Commands:
    """How ``_C.so`` is made; ``home`` is the CUDA toolkit or None."""
    compiler = environment("CXX", "c++")
    cxx = [*compiler, *FLAGS, *INCLUDES, *environment("CPPFLAGS"), *environment("CXXFLAGS")]
    nvcc: list[str] = []
    sources = sources_in("*.cpp", "cpu/*.cpp", "coding/*.cpp")
    libraries: list[str] = []
    if home is not None:
        sources += sources_in("cuda/*.cpp", "cuda/*.cu")
        cuda = ["-isystem", str(home / "include")]
        cxx += [f"-DWAVPRUNE_CUDA={','.join(map(str, CAPABILITIES))}", *cuda]
        host = [f"-Xcompiler={flag}" for flag in ("-fPIC", "-fvisibility=hidden")]
        nvcc = [str(home / "bin/nvcc"), "-std=c++20", "-O3", "-fmad=false", *host, *gencode()]
        # All architectures in parallel: they take most of the build.
        nvcc += ["--expt-relaxed-constexpr", "--threads=2", *TARGETS, *INCLUDES]
        # Linked statically, so that the extension loads without CUDA.
        libraries = [f"-L{home / 'lib64'}", "-lcudart_static", "-lrt", "-ldl", "-lpthread"]
    libraries += environment("LDFLAGS")
    if sys.platform == "darwin":
        link = [*compiler, "-bundle", "-undefined", "dynamic_lookup"]
        return Commands(cxx, nvcc, None, link, libraries, sources)
    # An empty library of that name: the loader takes torch's, which is loaded already.
    stub = [*compiler, "-shared", f"-Wl,-soname,{STUB}", "-x", "c++", os.devnull]
    link = [*compiler, "-shared", "-Wl,--no-as-needed"]
    return Commands(cxx, nvcc, stub, link, libraries, sources)


def ninja_file(steps: Commands) -> str:
    """The same for ninja, which compiles only what has changed."""
    lines = []
    for name, command in (("cxx", steps.cxx), ("nvcc", steps.nvcc)):
        lines += [
            f"rule {name}",
            f"  command = {shlex.join(command)} -MMD -MF $out.d -c $in -o $out",
            "  depfile = $out.d",
            "  deps = gcc",
        ]
    lines += ["rule link", f"  command = {shlex.join(steps.link)} $in -o $out "]
    lines[-1] += shlex.join(steps.libraries)
    objects = []
    for source in steps.sources:
        objects.append(escaped(f"{source}.o"))
        rule = "nvcc" if source.endswith(".cu") else "cxx"
        lines.append(f"build {objects[-1]}: {rule} {escaped(ROOT / source)}")
    if steps.stub is not None:
        lines += ["rule stub", f"  command = {shlex.join(steps.stub)} -o $out"]
        lines.append(f"build {STUB}: stub")
        objects.append(STUB)
    lines.append(f"build _C.so: link {' '.join(objects)}")
    return "\n".join(lines) + "\n"


def run_all(steps: Commands, folder: Path) -> None:
    """Run every step, as many compilers at a time as there are cores.

    Raises:
        CompileError: one failed.
    """

    def run(command: list[str]) -> None:
        if subprocess.run(command, check=False, cwd=folder).returncode:
            raise CompileError("compiling failed, see the lines above")

    def compile_one(source: str) -> str:
        target = folder / f"{source}.o"
        target.parent.mkdir(parents=True, exist_ok=True)
        run([*steps.compile(source), "-c", str(ROOT / source), "-o", str(target)])
        return str(target)

    workers = int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1)
    with ThreadPoolExecutor(workers) as pool:
        objects = list(pool.map(compile_one, steps.sources))
    if steps.stub is not None:
        run([*steps.stub, "-o", STUB])
        objects.append(STUB)
    run([*steps.link, *objects, "-o", "_C.so", *steps.libraries])


def compiled(folder: Path, home: Path | None) -> Path:
    """The extension, compiled in a folder where ninja finds earlier results again.

    Raises:
        CompileError: it does not compile, or there is no compiler.
    """
    compiler = environment("CXX", "c++")[0]
    if shutil.which(compiler) is None:
        raise CompileError(f"there is no C++ compiler {compiler!r}")
    folder.mkdir(parents=True, exist_ok=True)
    steps = commands(home)
    ninja = shutil.which("ninja", path=os.pathsep.join([ninja_folder(), os.environ["PATH"]]))
    if ninja is None:
        run_all(steps, folder)
        return folder / "_C.so"
    (folder / "build.ninja").write_text(ninja_file(steps))
    jobs = ["-j", os.environ["MAX_JOBS"]] if os.environ.get("MAX_JOBS") else []
    # Relative names in the file are in this folder.
    run = subprocess.run([ninja, "--quiet", *jobs, "-C", str(folder), "_C.so"], check=False)
    if run.returncode:
        raise CompileError("compiling failed, see the lines above")
    return folder / "_C.so"


def ninja_folder() -> str:
    """Where the ``ninja`` package has its program."""
    try:
        import ninja
    except ImportError:
        return ""
    return str(ninja.BIN_DIR)


class Build(build_ext):
    def build_extension(self, ext: Extension) -> None:
        target = Path(self.get_ext_fullpath(ext.name))
        target.unlink(missing_ok=True)
        folder = Path(self.build_temp).resolve()
        home = toolkit()
        try:
            built = compiled(folder, home)
        except CompileError as error:
            if home is None:
                print(f"wavprune: no compiled extension: {error}", file=sys.stderr)
                raise
            print(f"wavprune: no CUDA kernels: {error}", file=sys.stderr)
            built = compiled(folder, None)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(built, target)


def extension() -> dict[str, object]:
    if os.environ.get("WAVPRUNE_NO_EXTENSION"):
        return {}
    module = Extension(
        "wavprune._C",
        sources_in("*.cpp", "cpu/*.cpp", "coding/*.cpp"),
        py_limited_api=True,
        optional=True,
    )
    return {
        "ext_modules": [module],
        "cmdclass": {"build_ext": Build},
        "options": {"bdist_wheel": {"py_limited_api": "cp311"}},
    }


if __name__ == "__main__":
    setup(**extension())
