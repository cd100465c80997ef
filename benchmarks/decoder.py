"""The decoder in C against ``checkpoint.load``, on EfficientNet-Lite0 and one core.

    python -m benchmarks.decoder

prints the table of ``docs/how-to/decode-without-python.md``: the size of the code, the stack, and
the processor time of reading all tensors, the median of some runs in turns.
"""

from __future__ import annotations

import re
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from tests.support import decoder as c

from wavprune import checkpoint

from .networks import efficientnet_lite0

STEP = 0.0006
ROUNDS = 9


def code_size(folder: Path) -> int:
    """Bytes of code and constants."""
    flags = [*c.C99, "-Os", "-fno-asynchronous-unwind-tables", "-c"]
    compiled = c.compile_(folder / "small.o", [c.SOURCE], flags)
    printed = subprocess.run(["size", compiled], capture_output=True, text=True, check=True).stdout
    return int(printed.splitlines()[1].split()[0])


def stack_size(folder: Path, level: str) -> int:
    """Bytes of the deepest calls, return addresses among them: of gcc."""
    flags = [*c.C99, level, "-fcallgraph-info=su", "-c"]
    graph = c.compile_(folder / "graph.o", [c.SOURCE], flags).with_suffix(".ci").read_text()
    sizes = {
        name: int(size)
        for name, size in re.findall(r'title: "([^"]+)" label: "[^"]*?(\d+) bytes \(static', graph)
    }
    calls = re.findall(r'sourcename: "([^"]+)" targetname: "([^"]+)"', graph)

    def deepest(name: str) -> int:
        called = [deepest(target) for source, target in calls if source == name]
        return sizes.get(name, 0) + 8 + max(called, default=0)

    return max(map(deepest, sizes))


def reading(library: Path, data: bytes, cache: int) -> Callable[[], None]:
    decoder = c.Decoder(library, data, zstd=False, cache=cache)
    out = bytearray(max(decoder.tensor(i).room for i in range(len(decoder))))

    def read() -> None:
        for i in range(len(decoder)):
            decoder.read_into(i, out)

    return read


def main() -> None:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        network = efficientnet_lite0()
        saved = checkpoint.save(network, folder / "a.safetensors", coder="trellis", step=STEP)
        path = folder / "b.safetensors"
        size = checkpoint.portable(saved.path, path)
        print(f"{saved.bytes:,} bytes, portable {size:,}; {saved.numel:,} weights in matrices")
        print(f"code and constants, -Os: {code_size(folder):,} bytes")
        for level in ("-Os", "-O2"):
            print(f"stack, {level}: {stack_size(folder, level):,} bytes")
        ways: dict[str, Callable[[], object]] = {"Python": lambda: checkpoint.load(path)}
        for level in ("-O2", "-Os"):
            library = folder / f"decoder{level}.so"
            c.compile_(library, [c.SOURCE], [*c.C99, level, "-shared", "-fPIC"])
            for cache in (0, 1 << 16):
                key = f"C, {level}, {'a cache of 64 KB' if cache else 'its own 4 KB'}"
                ways[key] = reading(library, path.read_bytes(), cache)
        times: dict[str, list[float]] = {key: [] for key in ways}
        for _ in range(ROUNDS):
            for key, way in ways.items():
                start = time.process_time()
                way()
                times[key].append(time.process_time() - start)
        for key, taken in times.items():
            print(f"{key}: {1e3 * statistics.median(taken):.1f} ms")


if __name__ == "__main__":
    main()
