"""The service over HTTP, with its worker processes."""

from __future__ import annotations

import json
import struct
import time
import zipfile
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch
from safetensors.torch import load, save, save_file

import onnx
import wavprune
from tests.support import graphs
from tests.support.service import follow, running, upload
from wavprune.service.launcher import Launcher

pil = pytest.importorskip("PIL.Image")
pytestmark = pytest.mark.waits


@pytest.fixture(scope="module")
def model(client: httpx.Client, demo: Path) -> str:
    found = upload(client, demo)
    assert found["state"] == "ready", found
    return str(found["id"])


def job(client: httpx.Client, model: str, **settings: Any) -> dict[str, Any]:
    answer = client.post(f"/api/v1/models/{model}/jobs", json=settings)
    assert answer.status_code == 201, answer.text
    return follow(client, f"/api/v1/jobs/{answer.json()['id']}/events")[-1]


def test_a_model_is_looked_at_pruned_and_downloaded(client: httpx.Client, model: str) -> None:
    layers = client.get(f"/api/v1/models/{model}/layers").json()
    assert [layer["kernel"] for layer in layers["layers"][:2]] == [[3, 3], [3, 3]]
    settings = {"basis": "dct", "sparsity": 0.8}
    expected = client.post(f"/api/v1/models/{model}/preview", json=settings).json()
    done = job(client, model, kind="prune", **settings)
    assert done["state"] == "done", done
    assert done["result"]["kept"] == expected["kept"]
    assert done["result"]["error"] == pytest.approx(expected["error"], rel=1e-5)
    answer = client.get(f"/api/v1/jobs/{done['id']}/model")
    assert 'filename="digits-prune-dct-0.8.safetensors"' in answer.headers["content-disposition"]
    net = wavprune.demo.resnet()
    wavprune.fast.prune(net, wavelet="dct", sparsity=0.8)
    found = load(answer.content)
    assert all(torch.equal(found[name], value) for name, value in net.state_dict().items())
    report = client.get(f"/api/v1/jobs/{done['id']}/report").json()
    assert report["settings"]["wavelet"] == "dct"


def test_a_model_is_compressed_to_a_size(client: httpx.Client, model: str) -> None:
    done = job(client, model, kind="compress", basis="auto", target_bytes=30_000)
    assert done["result"]["bytes"] == pytest.approx(30_000, rel=0.02)
    failed = job(client, model, kind="compress", basis="auto", target_bytes=10)
    assert failed["state"] == "failed"
    assert failed["error"].startswith("no step brings the file to 10 bytes")
    assert client.get(f"/api/v1/jobs/{failed['id']}/model").status_code == 409


def test_a_file_that_is_none_is_refused_by_name(client: httpx.Client, tmp_path: Path) -> None:
    (tmp_path / "page.safetensors").write_text("<!doctype html><title>404</title>")
    found = upload(client, tmp_path / "page.safetensors")
    assert found["state"] == "refused"
    assert "a web page, not a checkpoint" in found["error"]
    assert "/" not in found["error"].replace("</", "")
    answer = client.post(f"/api/v1/models/{found['id']}/preview", json={})
    assert answer.status_code == 409
    assert "was refused" in answer.json()["detail"]


def test_what_cannot_run_is_not_calibrated(client: httpx.Client, model: str) -> None:
    answer = client.post(f"/api/v1/models/{model}/jobs", json={"kind": "calibrate"})
    assert answer.status_code == 409
    assert "cannot be run: it has only its weights" in answer.json()["detail"]


def test_a_graph_of_other_operators_is_pruned_and_not_run(
    client: httpx.Client, tmp_path: Path
) -> None:
    nodes = [
        onnx.helper.make_node("Conv", ["x", "w"], ["a"]),
        onnx.helper.make_node("Hardmax", ["a"], ["y"], "hard"),
    ]
    onnx.save(graphs.model_of(nodes, {"w": (4, 3, 3, 3)}), tmp_path / "net.onnx")
    found = upload(client, tmp_path / "net.onnx")
    assert found["state"] == "ready"
    assert not found["runs"]
    assert "torch: Hardmax (hard)" in found["cannot_run"]
    answer = client.post(f"/api/v1/models/{found['id']}/jobs", json={"kind": "calibrate"})
    assert answer.status_code == 409
    assert "torch: Hardmax (hard); allowed" in answer.json()["detail"]
    assert job(client, found["id"], kind="prune", basis="dct", sparsity=0.5)["state"] == "done"


def test_a_graph_is_calibrated_from_images_and_compared(
    client: httpx.Client, model: str, tmp_path: Path
) -> None:
    onnx.save(graphs.network(), tmp_path / "net.onnx")
    path = f"/api/v1/models/{upload(client, tmp_path / 'net.onnx')['id']}"
    assert client.get(path).json()["runs"]
    headers = {"content-type": "application/octet-stream"}
    pixels = np.random.default_rng(0).integers(0, 256, (8, 12, 12, 3)).astype(np.uint8)
    for number, values in enumerate(pixels):
        pil.fromarray(values).save(tmp_path / "image.png")
        content = (tmp_path / "image.png").read_bytes()
        sent = client.post(f"{path}/inputs?name=a.png", content=content, headers=headers)
        assert sent.json()["inputs"] == number + 1
    identity = path.rpartition("/")[2]
    normalized = {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}
    done = job(client, identity, kind="calibrate", basis="dct", sparsity=0.6, **normalized)
    assert done["state"] == "done", done
    assert done["result"]["inputs"] == 8
    assert 0 < done["result"]["output_error"] < 1
    answer = client.get(f"/api/v1/jobs/{done['id']}/model")
    assert 'filename="net-calibrate-dct-0.6.onnx"' in answer.headers["content-disposition"]
    assert graphs.run(onnx.load_from_string(answer.content), torch.zeros(1, 3, 8, 8)).shape == (
        1,
        5,
    )
    again = job(client, identity, kind="compare", job=done["id"], **normalized)
    assert again["result"]["kl"] == pytest.approx(done["result"]["kl"], rel=1e-6)
    assert again["result"]["file"] is None
    other = job(client, identity, kind="compare", job=done["id"])
    assert other["result"]["output_error"] != again["result"]["output_error"]
    ask = {"kind": "compare", "job": again["id"]}
    refused = client.post(f"{path}/jobs", json=ask)
    assert refused.status_code == 409
    assert refused.json()["detail"] == "that job did not make another form of this model"
    assert client.post(f"{path}/jobs", json={**ask, "job": "0" * 32}).status_code == 404
    assert client.post(f"{path}/jobs", json={**ask, "std": [0.0]}).status_code == 422
    failed = job(client, identity, kind="calibrate", mean=[0.0, 0.0])
    assert failed["error"].startswith("mean has 2 values for images of 3 channels")


def test_a_calibration_says_how_far_it_is_and_is_cancelled(
    client: httpx.Client, tmp_path: Path
) -> None:
    onnx.save(graphs.network(), tmp_path / "net.onnx")
    path = f"/api/v1/models/{upload(client, tmp_path / 'net.onnx')['id']}"
    images = np.random.default_rng(0).normal(size=(2048, 3, 8, 8)).astype(np.float32)
    np.savez(tmp_path / "inputs.npz", images=images)
    headers = {"content-type": "application/octet-stream"}
    content = (tmp_path / "inputs.npz").read_bytes()
    client.post(f"{path}/inputs?name=a.npz", content=content, headers=headers)
    asked = client.post(f"{path}/jobs", json={"kind": "calibrate", "level": "full"}).json()
    identity = f"/api/v1/jobs/{asked['id']}"
    seen = []
    with client.stream("GET", f"{identity}/events") as answer:
        for line in answer.iter_lines():
            event = json.loads(line.removeprefix("data: ") or "{}")
            seen.append((event.get("stage"), event.get("share")))
            if 0 < (event.get("share") or 0) < 1:
                cancelled = client.delete(identity).json()
                assert cancelled["state"] == "cancelled"
                break
    stage, share = seen[-1]
    assert stage in ("calibrate", "prune")
    assert 0 < share < 1
    assert client.get(identity).json()["result"] is None
    # Whoever does the next one is there at once.
    assert job(client, path.rpartition("/")[2], kind="prune")["state"] == "done"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kind": "prune", "sparsity": 1}, "sparsity: Input should be less than 1, not '1'"),
        ({"kind": "prune", "basis": "db9"}, "basis='db9'; allowed here: identity"),
        ({"kind": "melt"}, "kind: Input should be 'prune'"),
        ({"kind": "prune", "extra": 1}, "extra: Extra inputs"),
        ({"kind": "compare"}, "compare needs job"),
        ({"kind": "compress", "scope": "global"}, "compress takes scope 'layer'"),
    ],
)
def test_settings_are_refused_by_name(
    client: httpx.Client, model: str, settings: dict[str, Any], message: str
) -> None:
    answer = client.post(f"/api/v1/models/{model}/jobs", json=settings)
    assert answer.status_code == 422
    assert answer.json()["detail"].startswith(message)


def test_a_scope_that_is_none_is_refused(client: httpx.Client, model: str) -> None:
    path = f"/api/v1/models/{model}/kernels?layer=conv1&basis=dct&scope=banana"
    answer = client.get(path)
    assert answer.status_code == 422
    assert answer.json()["detail"].startswith("scope: Input should be 'layer' or 'global'")


def zipped(path: Path, files: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return path


def test_uploads_of_long_names_and_beyond_the_quota_stop_nothing(
    tmp_path: Path, launcher: Launcher
) -> None:
    tensor = {"dtype": "Q9", "shape": [1], "data_offsets": [0, 4]}
    header = json.dumps({"x" * 1_100_000: tensor}).encode()
    (tmp_path / "name.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + bytes(4))
    network = save({"a.weight": torch.randn(2, 2, 3, 3), "a.bias": torch.zeros(200_000)})
    left_out = {f"{i:02d}{'x' * 60_000}.py": b"" for i in range(20)}
    with (
        running(tmp_path / "kept", launcher, disk_bytes=3_600_000) as address,
        httpx.Client(base_url=address, timeout=60) as client,
    ):
        refused = upload(client, tmp_path / "name.safetensors")
        assert refused["state"] == "refused"
        assert len(refused["error"]) <= 2000
        names = zipped(tmp_path / "names.zip", {"model.safetensors": network, **left_out})
        assert upload(client, names)["state"] == "ready"
        # Small while it is packed.
        zeros = {f"{i}.txt": bytes(10**6) for i in range(3)}
        large = upload(
            client, zipped(tmp_path / "large.zip", {"model.safetensors": network, **zeros})
        )
        assert large["state"] == "refused"
        assert "unpacks to more than" in large["error"]
        kept = (path.stat().st_size for path in (tmp_path / "kept" / "models").rglob("*.*"))
        assert sum(kept) < 3_600_000


def test_a_large_job_is_cancelled_ended_or_too_large(tmp_path: Path, launcher: Launcher) -> None:
    """One worker: a job that runs, one that waits, and the queue's end."""
    large = {f"{i}.weight": torch.randn(256, 256, 3, 3) for i in range(6)}
    save_file(large, str(tmp_path / "large.safetensors"))
    limits = {"queue": 2, "worker_bytes": 700 * 10**6, "disk_bytes": 200 * 10**6}
    with (
        running(tmp_path / "kept", launcher, **limits) as address,
        httpx.Client(base_url=address, timeout=60) as client,
    ):
        found = upload(client, tmp_path / "large.safetensors")
        assert found["state"] == "ready", found
        path = f"/api/v1/models/{found['id']}/jobs"
        ask = {"kind": "compress", "basis": "auto", "target_bytes": 10**6}
        ids = [client.post(path, json=ask).json()["id"] for _ in range(2)]
        full = client.post(path, json=ask)
        assert full.status_code == 507
        assert "2 jobs wait or run" in full.json()["detail"]
        for identity in ids:
            assert client.delete(f"/api/v1/jobs/{identity}").json()["state"] == "cancelled"
        assert follow(client, f"/api/v1/jobs/{ids[0]}/events")[-1]["state"] == "cancelled"
        # The process is another one now, and works.
        small = job(client, found["id"], kind="prune", sparsity=0.5)
        assert small["state"] == "done", small
        assert client.delete(f"/api/v1/models/{found['id']}").status_code == 204
        assert client.get(f"/api/v1/models/{found['id']}").status_code == 404
        assert not list((tmp_path / "kept" / "jobs").iterdir())


def test_a_job_that_needs_too_much_memory_is_named(tmp_path: Path, launcher: Launcher) -> None:
    large = {"0.weight": torch.randn(512, 512, 3, 3)}
    save_file(large, str(tmp_path / "large.safetensors"))
    with (
        running(tmp_path / "kept", launcher, worker_bytes=1_000) as address,
        httpx.Client(base_url=address, timeout=60) as client,
    ):
        found = upload(client, tmp_path / "large.safetensors")
        assert client.get("/api/v1/about").status_code == 200
    assert found["state"] == "refused"
    assert "needs more memory" in found["error"] or "want of memory" in found["error"]


def test_what_nobody_looks_at_is_removed(tmp_path: Path, launcher: Launcher, demo: Path) -> None:
    with (
        running(tmp_path / "kept", launcher, idle_seconds=1.0) as address,
        httpx.Client(base_url=address, timeout=60) as client,
    ):
        identity = upload(client, demo)["id"]
        end = time.monotonic() + 60
        # The list of all models looks at none.
        while client.get("/api/v1/models").json():
            assert time.monotonic() < end
            time.sleep(0.05)
        assert client.get(f"/api/v1/models/{identity}").status_code == 404
        assert not list((tmp_path / "kept" / "models").iterdir())
