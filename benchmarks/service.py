"""The service on loopback: how long a preview takes, and what fifty people at a time do to it.

``python -m benchmarks.service MODEL... [--uploads 5] [--clients 50] [--jobs 10] [--seconds 10]``
starts ``wavprune serve`` in a directory of its own, uploads each checkpoint some times and prints,
for each: seconds from the first byte that is sent to the layers and curves that are received, and
the latency of single previews. A MODEL is a file, ``ResNet-18`` (random weights) or
``EfficientNet-Lite0``. Then all clients preview the first model at once, each with its own
settings, while the jobs are queued; the memory of the server and its workers is read meanwhile.
``--clients 0`` leaves that out.
"""

from __future__ import annotations

import argparse
import os
import random
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import httpx
from safetensors.torch import save_file

from .networks import NETWORKS

SINGLE = 400
BINARY = {"content-type": "application/octet-stream"}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("models", nargs="+")
    parser.add_argument("--uploads", type=int, default=5)
    parser.add_argument("--clients", type=int, default=50)
    parser.add_argument("--jobs", type=int, default=10)
    parser.add_argument("--seconds", type=float, default=10.0)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        server = subprocess.Popen(
            [sys.executable, "-m", "wavprune", "serve", "--port=0", f"--directory={directory}"],
            stdout=subprocess.PIPE,
            text=True,
        )
        assert server.stdout is not None
        address = server.stdout.readline().split()[2].rstrip("/")
        try:
            with httpx.Client(base_url=address, timeout=120) as client:
                files = [checkpoint(name, Path(directory)) for name in asked.models]
                ids = [single(client, path, asked.uploads) for path in files]
            if asked.clients:
                load(address, server.pid, ids[0], asked)
        finally:
            server.terminate()
            server.wait()


def checkpoint(name: str, directory: Path) -> Path:
    """A file that was named, or one with the weights of a network of ``benchmarks.networks``."""
    if name not in NETWORKS:
        return Path(name)
    path = directory / f"{name}.safetensors"
    save_file(NETWORKS[name]().state_dict(), str(path))
    return path


def single(client: httpx.Client, path: Path, uploads: int) -> str:
    """Upload a model some times, and preview it alone; returns its id."""
    content = path.read_bytes()
    # The first request waits for the server's own start.
    client.get("/api/v1/about")
    every = []
    for _ in range(uploads):
        start = time.perf_counter()
        answer = client.post(
            "/api/v1/models", params={"name": path.name}, content=content, headers=BINARY
        )
        identity: str = answer.raise_for_status().json()["id"]
        sent = time.perf_counter() - start
        with client.stream("GET", f"/api/v1/models/{identity}/events") as events:
            for _ in events.iter_lines():
                pass
        measured = time.perf_counter() - start
        layers = client.get(f"/api/v1/models/{identity}/layers").raise_for_status().json()
        client.get(f"/api/v1/models/{identity}/curves").raise_for_status()
        every.append((time.perf_counter() - start, sent, measured))
    print(
        f"{path.name}: {len(content):,} bytes, {len(layers['layers'])} layers, "
        f"{layers['weights']:,} weights, {len(layers['bases'])} bases"
    )
    ready, sent, measured = sorted(every)[len(every) // 2]
    print(
        f"  curves after {ready:.2f} s, median of {uploads} uploads "
        f"({min(every)[0]:.2f} to {max(every)[0]:.2f}): sent after {sent:.2f}, measured after "
        f"{measured:.2f}"
    )
    for scope in ("layer", "global"):
        chance = random.Random(0)
        times = []
        for _ in range(SINGLE if scope == "layer" else SINGLE // 4):
            settings = {**drawn(chance, layers["bases"]), "scope": scope}
            start = time.perf_counter()
            client.post(f"/api/v1/models/{identity}/preview", json=settings).raise_for_status()
            times.append(time.perf_counter() - start)
        print(f"  preview, scope {scope}: {described(times)}")
    return identity


def load(address: str, server: int, model: str, asked: Any) -> None:
    """Many clients at once, and jobs meanwhile."""
    before = memory(server)
    with httpx.Client(base_url=address, timeout=120) as client:
        bases = client.get(f"/api/v1/models/{model}/layers").json()["bases"]
        end = time.monotonic() + asked.seconds
        times: list[list[float]] = [[] for _ in range(asked.clients)]
        failures: list[str] = []
        clients = [
            threading.Thread(
                target=person, args=(address, model, bases, end, i, times[i], failures)
            )
            for i in range(asked.clients)
        ]
        for one in clients:
            one.start()
        kinds: list[dict[str, Any]] = [
            {"kind": "prune", "sparsity": 0.8},
            {"kind": "compress", "sparsity": 0.8},
        ]
        jobs = [
            client.post(f"/api/v1/models/{model}/jobs", json=kinds[i % 2]).json()["id"]
            for i in range(asked.jobs)
        ]
        peak = before
        while any(one.is_alive() for one in clients):
            peak = {name: max(value, peak.get(name, 0)) for name, value in memory(server).items()}
            time.sleep(0.05)
        states: list[str] = []
        while len(states) < len(jobs):
            found = [client.get(f"/api/v1/jobs/{job}").json()["state"] for job in jobs]
            states = [state for state in found if state not in ("queued", "running")]
            peak = {name: max(value, peak.get(name, 0)) for name, value in memory(server).items()}
            time.sleep(0.05)
    every = [one for own in times for one in own]
    rate = len(every) / asked.seconds
    print(
        f"{asked.clients} clients for {asked.seconds:g} s: {rate:.0f} previews a second, "
        f"{described(every)}; {len(failures)} failed"
    )
    print(f"{len(jobs)} jobs meanwhile: {', '.join(sorted(set(states)))}")
    for name, value in peak.items():
        print(
            f"  memory of its own, {name}: {before.get(name, 0):.0f} MB before, {value:.0f} MB peak"
        )


def person(
    address: str,
    model: str,
    bases: list[str],
    end: float,
    seed: int,
    times: list[float],
    failures: list[str],
) -> None:
    """One client that previews without a pause."""
    chance = random.Random(seed)
    with httpx.Client(base_url=address, timeout=120) as client:
        while time.monotonic() < end:
            start = time.perf_counter()
            answer = client.post(f"/api/v1/models/{model}/preview", json=drawn(chance, bases))
            times.append(time.perf_counter() - start)
            if answer.status_code != 200:
                failures.append(answer.text)


def drawn(chance: random.Random, bases: list[str]) -> dict[str, Any]:
    """Some settings."""
    return {"basis": chance.choice([*bases, "auto"]), "sparsity": chance.randrange(200) / 200}


def described(times: list[float]) -> str:
    """Median and 95th percentile."""
    ordered = sorted(times)
    return (
        f"median {1e3 * statistics.median(ordered):.2f} ms, p95 "
        f"{1e3 * ordered[int(0.95 * len(ordered))]:.2f} ms"
    )


def memory(server: int) -> dict[str, float]:
    """Memory in MB that only these processes have: the server, and all others of it together."""
    family = [server]
    for pid in family:
        try:
            children = Path(f"/proc/{pid}/task/{pid}/children").read_text()
        except OSError:
            continue
        family += map(int, children.split())
    return {"server": _own(server), "workers": sum(map(_own, family[1:]))}


def _own(pid: int) -> float:
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0.0
    page = [line.split() for line in lines if line.startswith(("Private_", "Pss:"))]
    return sum(int(size) for name, size, _ in page if name != "Pss:") / 1000


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", str(os.cpu_count() or 1))
    main()
