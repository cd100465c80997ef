"""The tests and benchmarks of a GPU, and a report of them: ``make gpu``.

    python -m benchmarks.gpu_report [--out gpu-report.json]

It takes the interpreter's own torch, numpy, pytest and triton, and needs beside them PyWavelets
alone. In the project's directory it builds the extension for the card that is there, runs the tests
that are marked ``gpu``, ``bench_gpu.py`` and ``bench_gpu_decode.py`` (which is skipped without
safetensors and zstandard), then a short run under ``compute-sanitizer`` where
that is installed. It writes what it found, and prints measured beside computed times. It ends
within eight minutes: a step that takes too long is stopped.

Exit status: 0 where all is well, 1 where a step failed, 2 where there is nothing to run on.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

ROOT = Path(__file__).resolve().parents[1]
OK, FAILED, NO_GPU = 0, 1, 2
# Seconds that a step may take, at most, and all of them together.
LIMITS = {"build": 120, "tests": 150, "benchmarks": 180, "memcheck": 60, "racecheck": 60}
TOGETHER = 450
NEEDED = {"numpy": "numpy", "pytest": "pytest", "pywt": "PyWavelets"}
PYTEST = ["-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider"]
# Warnings are errors with the packages that the tests were written for; here any may be there.
PYTEST += ["-o", "filterwarnings=default"]
STARTED = time.monotonic()

# Every CUDA and Triton kernel, and as little else as possible: the sanitizers are slow.
SHORT_RUN = """
import sys, torch, wavprune
from wavprune import LayerRef, PruneConfig, prune_layers
from wavprune.engine.projection import project_layers, projection_plan
shapes = ((40, 8, 3, 3), (7, 40, 5, 5), (9, 7, 1, 1))
settings = (
    {}, {"wavelet": "haar"}, {"scope": "global"}, {"method": "random"},
    {"percentile": 50, "wavelet": "haar"},
)
for backend in sys.argv[2:]:
    for layout in (torch.contiguous_format, torch.channels_last):
        for setting in settings:
            refs = [
                LayerRef(str(i), torch.randn(shape).cuda().contiguous(memory_format=layout))
                for i, shape in enumerate(shapes)
            ]
            config = PruneConfig(backend=backend, **setting)
            report = prune_layers(refs, config, masks=True)
            plan = projection_plan(refs, config, [report.bases[ref.name] for ref in refs])
            project_layers(plan, refs, [report.masks[ref.name] for ref in refs])
            print(backend, setting, report.kept)
try:
    import safetensors, zstandard
except ImportError:
    sys.exit()
from wavprune import checkpoint
state = {f"{i}.weight": torch.randn(shape) for i, shape in enumerate(shapes)}
checkpoint.save(state, sys.argv[1], coder="trellis", wavelet="dct", step=0.003)
print(len(checkpoint.load(sys.argv[1], device="cuda")))
"""


class Step:
    """A command that ran, with its exit status, seconds and the end of its output."""

    def __init__(
        self, name: str, command: list[str], environment: dict[str, str] | None = None
    ) -> None:
        start = time.monotonic()
        limit = max(min(LIMITS[name], STARTED + TOGETHER - start), 1)
        try:
            run = subprocess.run(
                command,
                cwd=ROOT,
                env={**os.environ, **(environment or {})},
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                timeout=limit,
                check=False,
            )
            self.status, self.output = run.returncode, run.stdout
        except subprocess.TimeoutExpired as error:
            said = error.stdout or b""
            self.status = 124
            self.output = said.decode(errors="replace") if isinstance(said, bytes) else said
            self.output += f"\nstopped after {limit:.0f} seconds\n"
        self.seconds = time.monotonic() - start

    def facts(self) -> dict[str, Any]:
        """For the report."""
        facts: dict[str, Any] = {"status": self.status, "seconds": round(self.seconds, 1)}
        if self.status != 0:
            facts["output"] = self.output[-4000:]
        return facts


def obstacle() -> str | None:
    """Why nothing can be measured here, or None."""
    if importlib.util.find_spec("torch") is None:
        return f"there is no torch for {sys.executable}"
    import torch

    if not torch.cuda.is_available():
        return f"there is no GPU here: torch {torch.__version__} sees no CUDA device"
    missing = [name for module, name in NEEDED.items() if importlib.util.find_spec(module) is None]
    return f"there is no {' and no '.join(missing)} for {sys.executable}" if missing else None


def machine() -> dict[str, Any]:
    """What the figures were measured on."""
    import torch

    has_triton = importlib.util.find_spec("triton") is not None
    return {
        "card": torch.cuda.get_device_name(),
        "capability": "{}.{}".format(*torch.cuda.get_device_capability()),
        "memory": torch.cuda.get_device_properties(0).total_memory,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "triton": __import__("triton").__version__ if has_triton else None,
    }


def build(capability: str) -> dict[str, Any]:
    """Build the extension in place, for this card alone."""
    step = Step(
        "build",
        [sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"],
        {"WAVPRUNE_CUDA_CAPABILITIES": capability.replace(".", "")},
    )
    facts = step.facts()
    # setup.py leaves out what does not compile, and says so.
    said = [line for line in step.output.splitlines() if line.startswith("wavprune:")]
    return {**facts, "said": said} if said else facts


def tests(directory: Path) -> dict[str, Any]:
    """Run the tests of a GPU."""
    results = directory / "tests.xml"
    step = Step("tests", [sys.executable, *PYTEST, f"--junitxml={results}", "tests"])
    facts = step.facts()
    if results.exists():
        suite = ElementTree.parse(results).getroot().find("testsuite")
        assert suite is not None
        counts = {key: int(suite.get(key, 0)) for key in ("tests", "failures", "errors", "skipped")}
        facts.update(counts)
        facts["failed"] = [
            f"{case.get('classname')}.{case.get('name')}"
            for case in suite.iter("testcase")
            if case.find("failure") is not None or case.find("error") is not None
        ]
    return facts


def benchmarks(directory: Path) -> dict[str, Any]:
    """Time all rows, and print them beside what was computed."""
    figures, decoding = directory / "figures.json", directory / "decoding.json"
    step = Step(
        "benchmarks",
        [sys.executable, *PYTEST, "benchmarks/bench_gpu.py", "benchmarks/bench_gpu_decode.py"],
        {"WAVPRUNE_GPU_REPORT": str(figures), "WAVPRUNE_GPU_DECODE_REPORT": str(decoding)},
    )
    print(step.output, flush=True)
    found = json.loads(figures.read_text()) if figures.exists() else {}
    rows = json.loads(decoding.read_text()) if decoding.exists() else []
    return {**step.facts(), "networks": found, "decoding": rows}


def sanitizers() -> dict[str, Any]:
    """A short run of both backends under memcheck and racecheck."""
    tool = shutil.which("compute-sanitizer")
    if tool is None:
        return {"skipped": "compute-sanitizer is not installed"}
    from wavprune import backends

    names = [name for name in ("native", "triton") if name not in backends.unavailable()]
    found = {}
    with tempfile.TemporaryDirectory() as directory:
        path = str(Path(directory) / "weights.safetensors")
        for check in ("memcheck", "racecheck"):
            command = [tool, "--tool", check, "--error-exitcode", "1"]
            command += [sys.executable, "-c", SHORT_RUN, path, *names]
            found[check] = Step(check, command).facts()
    return found


def main() -> int:
    """Run everything; the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("gpu-report.json"))
    out = parser.parse_args().out
    reason = obstacle()
    if reason is not None:
        print(f"gpu: nothing was run: {reason}", file=sys.stderr)
        return NO_GPU
    os.environ["PYTHONPATH"] = os.pathsep.join(
        filter(None, [str(ROOT / "src"), str(ROOT), os.environ.get("PYTHONPATH")])
    )
    sys.path[:0] = [str(ROOT / "src")]
    report: dict[str, Any] = {"machine": machine()}
    print(report["machine"], flush=True)
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        steps = {
            "build": lambda: build(report["machine"]["capability"]),
            "tests": lambda: tests(directory),
            "benchmarks": lambda: benchmarks(directory),
            "sanitizers": sanitizers,
        }
        for step, run in steps.items():
            report[step] = run()
            shown = {k: v for k, v in report[step].items() if k not in ("networks", "decoding")}
            print(f"{step}: {shown}", flush=True)
            # Written after each step: what was measured is not lost with a later one.
            out.write_text(json.dumps(report, indent=1) + "\n")
    print(f"gpu: {report['machine']['card']}; see {out}")
    return FAILED if any(has_failed(report[step]) for step in steps) else OK


def has_failed(facts: dict[str, Any]) -> bool:
    """True where a step, or a part of it, ended with another status than 0."""
    parts = [facts, *(part for part in facts.values() if isinstance(part, dict))]
    return any(part.get("status", 0) != 0 for part in parts)


if __name__ == "__main__":
    sys.exit(main())
