"""Compile every Triton kernel ahead of time, as it is launched: run by test_triton.py.

    python tests/compile_triton.py sm_80 sm_90 sm_100 gfx942

It needs no GPU, and triton must not interpret. Prints a table of what each kernel takes, and fails
where one spills, takes more than 128 registers, or treats denormals as 0.
"""

from __future__ import annotations

import inspect
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

# triton has no types
import triton  # type: ignore[import-untyped]
from triton.backends.compiler import GPUTarget  # type: ignore[import-untyped]
from triton.compiler import ASTSource  # type: ignore[import-untyped]

from wavprune.backends.triton import backend as subject
from wavprune.backends.triton import kernels as triton_kernels

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
MOST_REGISTERS = 128
MOST_SHARED = 48 * 1024
CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"


class Used(NamedTuple):
    """What one compiled kernel takes.

    Attributes:
        registers: of each thread.
        spilled: bytes of a thread's memory, or vector registers, for what found no register.
        parked: scalar registers held in lanes of vector registers (AMD).
        shared: bytes of shared memory of each program.
    """

    registers: int
    spilled: int
    parked: int
    shared: int


def used(name: str, wide: bool | None, target: str) -> Used:
    """Compile one kernel as triton.py launches it."""
    kernel = getattr(triton_kernels, name)
    names = list(inspect.signature(kernel.fn).parameters)
    # Neither the values nor the alignment of arguments are specialised on: see the decorators.
    assert {param.name for param in kernel.params if not param.do_not_specialize} == {
        name for name in names if name in POINTERS or name == "WIDE"
    }
    assert all(
        param.do_not_specialize_on_alignment for param in kernel.params if param.name in POINTERS
    )
    signature = {n: "constexpr" if n == "WIDE" else POINTERS.get(n, "i32") for n in names}
    constants = {} if wide is None else {(names.index("WIDE"),): wide}
    nvidia = target.startswith("sm")
    compiled = triton.compile(
        ASTSource(fn=kernel, signature=signature, constexprs=constants),
        target=TARGETS[target],
        options=dict(subject.options(nvidia)),
    )
    shared = int(compiled.metadata.shared)
    if nvidia:
        assert ".ftz" not in compiled.asm["ptx"], "denormals would count as 0"
        found = resources(compiled.asm["cubin"])
        return Used(found["REG"], found["STACK"] + found["LOCAL"], 0, shared)
    text = compiled.asm["amdgcn"]

    def number(key: str) -> int:
        match = re.search(rf"\.{key}:?\s+(\d+)", text)
        assert match is not None, key
        return int(match[1])

    assert number("amdhsa_float_denorm_mode_32") == 3, "denormals would count as 0"
    spilled = number("vgpr_spill_count") + number("private_segment_fixed_size")
    return Used(
        number("vgpr_count") + number("agpr_count"), spilled, number("sgpr_spill_count"), shared
    )


def resources(cubin: bytes) -> dict[str, int]:
    """What the assembler wrote down about the one kernel of a cubin."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        run = subprocess.run(
            [CUOBJDUMP, "-res-usage", file.name], check=True, capture_output=True, text=True
        )
    return {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", run.stdout)}


def main(targets: list[str]) -> int:
    """Compile for these targets; 1 where a kernel takes too much."""
    faults = []
    variants: list[tuple[str, bool | None]] = [
        *((name, wide) for name in ("count", "conclude", "prune") for wide in (False, True)),
        ("total", None),
    ]
    print(f"{'target':8}{'kernel':10}{'number':10}registers  spilled  parked  shared")
    for target in targets:
        for name, wide in variants:
            found = used(name, wide, target)
            number = {None: "-", False: "float32", True: "float64"}[wide]
            line: Any = f"{target:8}{name:10}{number:10}{found.registers:9}{found.spilled:9}"
            line += f"{found.parked:8}{found.shared:8}"
            print(line, flush=True)
            if found.registers > MOST_REGISTERS or found.spilled or found.shared > MOST_SHARED:
                faults.append(line)
    for fault in faults:
        print("too much:", fault)
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:] or list(TARGETS)))
