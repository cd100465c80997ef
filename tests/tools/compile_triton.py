"""Compile every Triton kernel ahead of time, as it is launched; test_triton.py runs this.

    python tests/tools/compile_triton.py sm_80 sm_90 sm_100 gfx942

It needs no GPU. Triton must not interpret. Prints the resources of each Triton kernel, and fails
where one spills, takes more than 128 registers, or flushes denormals.
"""

from __future__ import annotations

import inspect
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

# triton has no types
import triton  # type: ignore[import-untyped]
from triton.backends.compiler import GPUTarget  # type: ignore[import-untyped]
from triton.compiler import ASTSource  # type: ignore[import-untyped]

from wavprune.backends.triton import backend as subject
from wavprune.backends.triton import kernels as selecting
from wavprune.backends.triton import pruning

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
POINTERS = {
    "table": "*i64",
    "jobs": "*i64",
    "states": "*i64",
    "thresholds": "*fp64",
    "partials": "*fp64",
    "sums": "*fp64",
}
KERNELS = {
    name: getattr(module, name)
    for module, names in (
        (selecting, ("count_digits", "resolve_thresholds")),
        (pruning, ("prune_layers", "prune_by_masks", "mark_layers")),
        (pruning, ("sum_partials",)),
    )
    for name in names
}
MAX_REGISTERS = 128
MAX_SHARED = 48 * 1024
CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"


class Resources(NamedTuple):
    """What one compiled Triton kernel uses.

    Attributes:
        registers: per thread.
        spilled: bytes (NVIDIA) or vector registers (AMD) per thread that are spilled to memory.
        scalars_in_lanes: scalar registers kept in lanes of vector registers (AMD).
        shared: bytes of shared memory per program.
    """

    registers: int
    spilled: int
    scalars_in_lanes: int
    shared: int


def resources(name: str, in_float64: bool | None, target: str) -> Resources:
    """Compile one Triton kernel as the backend launches it."""
    kernel = KERNELS[name]
    names = list(inspect.signature(kernel.fn).parameters)
    # It is specialized neither on values nor on the alignment of pointers.
    assert {param.name for param in kernel.params if not param.do_not_specialize} == {
        name for name in names if name in POINTERS or name == "IN_FLOAT64"
    }
    assert all(
        param.do_not_specialize_on_alignment for param in kernel.params if param.name in POINTERS
    )
    signature = {n: "constexpr" if n == "IN_FLOAT64" else POINTERS.get(n, "i32") for n in names}
    constants = {} if in_float64 is None else {(names.index("IN_FLOAT64"),): in_float64}
    nvidia = target.startswith("sm")
    compiled = triton.compile(
        ASTSource(fn=kernel, signature=signature, constexprs=constants),
        target=TARGETS[target],
        options=dict(subject.options(nvidia)),
    )
    shared = int(compiled.metadata.shared)
    if nvidia:
        assert ".ftz" not in compiled.asm["ptx"], "denormals are flushed"
        usage = cubin_usage(compiled.asm["cubin"])
        return Resources(usage["REG"], usage["STACK"] + usage["LOCAL"], 0, shared)
    text = compiled.asm["amdgcn"]

    def number(key: str) -> int:
        match = re.search(rf"\.{key}:?\s+(\d+)", text)
        assert match is not None, key
        return int(match[1])

    assert number("amdhsa_float_denorm_mode_32") == 3, "denormals are flushed"
    spilled = number("vgpr_spill_count") + number("private_segment_fixed_size")
    registers = number("vgpr_count") + number("agpr_count")
    return Resources(registers, spilled, number("sgpr_spill_count"), shared)


def cubin_usage(cubin: bytes) -> dict[str, int]:
    """The resources of the one Triton kernel of a cubin, as the assembler recorded them."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        run = subprocess.run(
            [CUOBJDUMP, "-res-usage", file.name], check=True, capture_output=True, text=True
        )
    return {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", run.stdout)}


def main(targets: list[str]) -> int:
    """Compile for these targets; 1 where a Triton kernel takes too much."""
    excessive = []
    variants: list[tuple[str, bool | None]] = [
        (name, in_float64)
        for name in KERNELS
        for in_float64 in ((None,) if name == "sum_partials" else (False, True))
    ]
    print(f"{'target':8}{'Triton kernel':20}{'dtype':10}registers  spilled  in lanes  shared")
    for target in targets:
        for name, in_float64 in variants:
            used = resources(name, in_float64, target)
            dtype = {None: "-", False: "float32", True: "float64"}[in_float64]
            line = f"{target:8}{name:20}{dtype:10}{used.registers:9}{used.spilled:9}"
            line += f"{used.scalars_in_lanes:10}{used.shared:8}"
            print(line, flush=True)
            if used.registers > MAX_REGISTERS or used.spilled or used.shared > MAX_SHARED:
                excessive.append(line)
    for line in excessive:
        print("too much:", line)
    return 1 if excessive else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:] or list(TARGETS)))
