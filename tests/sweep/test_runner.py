from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import joblib
import pandas as pd
import pytest
import torch
import yaml

from tests.support import sweeps
from wavprune import LevelCollapsedWarning, PruneConfig
from wavprune.common.clock import PARTS
from wavprune.evaluation.trial import run_trial
from wavprune.sweep import worker
from wavprune.sweep.data import load_data
from wavprune.sweep.grid import expand
from wavprune.sweep.models import load_model
from wavprune.sweep.runner import run_sweep
from wavprune.sweep.store import Store

# What a run measures that does not depend on when and where it ran.
MEASURED = ["guid", "method", "wavelet", "kept", "top1", "loss", "relative_error", "stored_bytes"]
MANY = [i / 30 for i in range(1, 30)]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return sweeps.folder(tmp_path_factory.mktemp("sweep"))


@pytest.fixture
def db(tmp_path: Path) -> Path:
    return tmp_path / "results.db"


def runs(path: Path) -> pd.DataFrame:
    with Store(path) as store:
        return store.runs()


def command(root: Path, content: dict[str, Any], db: Path, *options: str) -> list[str]:
    # Next to the factory's module, where its name is looked for.
    file = root / f"{db.parent.name}-{len(list(root.glob('*.yaml')))}.yaml"
    file.write_text(yaml.safe_dump(content))
    return [sys.executable, "-m", "wavprune", "sweep", str(file), "-o", str(db), *options]


def measured(frame: pd.DataFrame) -> pd.DataFrame:
    return frame[MEASURED].sort_values("guid", ignore_index=True)


def children(pid: int) -> set[int]:
    """All processes below this one."""
    found = subprocess.run(["ps", "-eo", "pid=,ppid="], capture_output=True, text=True, check=True)
    pairs = [tuple(map(int, line.split())) for line in found.stdout.splitlines()]
    below = {pid}
    while True:
        more = {child for child, parent in pairs if parent in below} | below
        if more == below:
            return below - {pid}
        below = more


def alive(pids: set[int]) -> set[int]:
    """Those of the processes that still run; a zombie does not."""
    states = {}
    for pid in pids:
        try:
            states[pid] = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except OSError:
            continue
    return {pid for pid, state in states.items() if state != "Z"}


def until(condition: Any, seconds: float = 300) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.02)


@pytest.fixture
def started() -> Iterator[list[subprocess.Popen[str]]]:
    """Processes that are ended with the test, whatever becomes of it."""
    processes: list[subprocess.Popen[str]] = []
    yield processes
    for process in processes:
        process.kill()
        process.communicate()


def test_each_run_is_what_run_trial_gives(root: Path, db: Path) -> None:
    sweep = sweeps.sweep(root)
    summary = run_sweep(sweep, db, jobs=1)
    assert (summary.runs, summary.ok, summary.failed, summary.known) == (5, 5, 0, 0)
    frame = runs(db)
    assert frame["method"].tolist() == ["none", "dwt", "min_weight", "dwt", "min_weight"]
    with Store(db) as store:
        layers = store.layers().set_index("guid")
    for run, (_, row) in zip(expand(sweep), frame.iterrows(), strict=True):
        loader = load_data(sweep.data, sweep.batch_size)
        trial = run_trial(load_model(run.model), loader, run.config, batchnorm="off", timing=False)
        found = trial.evaluation
        assert row[["top1", "loss", "kl", "stored_bytes"]].tolist() == [
            found.top1,
            found.loss,
            found.kl,
            found.stored_bytes,
        ]
        assert row["sparsity_requested"] == run.config.sparsity if run.config else True
        assert json.loads(row["settings"])["config"] == run.settings()["config"] or run.config
        assert json.loads(row["versions"])["torch"] == torch.__version__
        if trial.report:
            assert row["kept"] == trial.report.kept
            mine = layers.loc[[row["guid"]]]
            assert mine["name"].tolist() == ["conv1", "conv2"]
            assert mine["kept"].tolist() == [layer.kept for layer in trial.report]


def test_pictures_show_what_was_cut(root: Path, db: Path) -> None:
    run_sweep(sweeps.sweep(root), db, jobs=1)
    with Store(db) as store:
        frame, layers = store.runs(), store.layers()
        unpruned, row = frame.iloc[0], frame.iloc[3]
        assert row[["method", "sparsity_requested"]].tolist() == ["dwt", 0.9]
        pictures = store.pictures(row["guid"])
        assert store.pictures(unpruned["guid"])["histograms"] is None
    assert sum(map(sum, pictures["confusion"])) == 64
    for histogram, (_, layer) in zip(
        pictures["histograms"], layers[layers["guid"] == row["guid"]].iterrows(), strict=True
    ):
        counts, edges = histogram["counts"], histogram["edges"]
        assert histogram["layer"] == layer["name"]
        assert histogram["threshold"] == layer["threshold"]
        assert len(edges) == len(counts) + 1
        # Haar's structural zeros are no coefficients.
        assert sum(counts) == layer["coefficients"]
        above = sum(n for n, low in zip(counts, edges, strict=False) if low >= layer["threshold"])
        inside = max(counts)
        assert above <= layer["kept"] <= above + inside
    kernels = pictures["kernels"]
    net = load_model(sweeps.sweep(root).models[0])
    weight = net.get_parameter("conv1.weight").detach()
    torch.testing.assert_close(
        torch.tensor(kernels["before"]), weight.flatten(0, 1), rtol=1e-4, atol=1e-6
    )
    assert torch.tensor(kernels["after"]).shape == (8, 3, 3)
    assert kernels["after"] != kernels["before"]


def test_matrices_and_chosen_bases_have_pictures_too(root: Path, db: Path) -> None:
    grid = {
        "wavelet": ["auto", "db4", "uhaar", "identity"],
        "targets": ["fc1", "fc2"],
        "sparsity": 0.8,
    }
    content = sweeps.content(model="demo-mlp", data="demo", grid=grid)
    summary = run_sweep(sweeps.sweep(root, content), db, jobs=1)
    assert (summary.ok, summary.failed) == (5, 0)
    with Store(db) as store:
        frame, layers = store.runs(), store.layers()
        for guid in frame["guid"][1:]:
            for drawn in store.pictures(guid)["histograms"]:
                mine = layers[(layers["guid"] == guid) & (layers["name"] == drawn["layer"])].iloc[0]
                low = drawn["edges"][: len(drawn["counts"])]
                above = sum(n for n, edge in zip(drawn["counts"], low, strict=True) if edge > 0)
                assert mine["kept"] <= above + drawn["counts"][0]
                assert sum(drawn["counts"]) >= mine["coefficients"]
    assert frame["targets"].tolist()[1:] == ["fc1 fc2"] * 4
    chosen = layers[layers["guid"] == frame["guid"][1]]
    assert "auto" not in chosen["wavelet"].tolist()
    assert chosen["runner_up"].notna().all()


def test_matched_runs_share_what_they_are_matched_in(root: Path, db: Path) -> None:
    grid = {
        "method": ["dwt", "min_weight", "random"],
        "wavelet": ["haar", "db2"],
        "percentile": 70,
        "level": 1,
        "force_level": True,
        "matched": "kept",
    }
    size = {"method": ["dwt", "min_weight"], "wavelet": "db2", "sparsity": 0.8, "matched": "bytes"}
    forced = {"level": 1, "force_level": True, "mode": "symmetric"}
    sweep = sweeps.sweep(root, sweeps.content(grid=[grid, {**size, **forced}]))
    with pytest.warns(UserWarning, match="all coefficients will experience boundary effects"):
        assert run_sweep(sweep, db, jobs=1).failed == 0
    frame = runs(db)
    kept = frame[frame["percentile"].notna()].set_index("wavelet")["kept"]
    for method in ("min_weight", "random"):
        followers = frame[(frame["method"] == method) & (frame["matched"] == "kept")]
        assert sorted(followers["kept"]) == pytest.approx(sorted(kept), abs=1)
        assert followers["sparsity_requested"].isna().all()
    matched = frame[frame["matched"] == "bytes"].iloc[0]
    baseline = frame[(frame["method"] == "min_weight") & (frame["matched"] == "")].iloc[0]
    assert matched["stored_bytes"] <= baseline["stored_bytes"]
    assert matched["kept"] < baseline["kept"]


def test_batch_norms_are_repaired_on_the_calibration_data(root: Path, db: Path) -> None:
    grid = {"sparsity": 0.9, "scope": "global"}
    settings: dict[str, Any] = {"batchnorm": ["off", "update", "match"], "grid": grid}
    told = {"factory": "module:loader", "arguments": {"samples": 24}}
    run_sweep(sweeps.sweep(root, sweeps.content(**settings)), db, jobs=1)
    summary = run_sweep(
        sweeps.sweep(root, sweeps.content(**settings, calibration=told)), db, jobs=1
    )
    # Without a repair nothing is calibrated, and that run is the same one.
    assert (summary.ok, summary.known) == (2, 2)
    frame = runs(db)
    assert frame["batchnorm"].tolist() == ["off", "off", "update", "match", "update", "match"]
    assert frame["loss"].nunique() == 6
    assert (frame["repair_seconds"][2:] > 0).all()


def test_calibrated_runs_are_what_run_trial_gives(root: Path, db: Path) -> None:
    grid = {"wavelet": "dct", "sparsity": [0.5, 0.9], "calibrated": ["", "refit"]}
    sweep = sweeps.sweep(root, sweeps.content(grid=grid))
    assert run_sweep(sweep, db, jobs=1).failed == 0
    rows = runs(db)
    model, data = load_model(sweep.models[0]), load_data(sweep.data, sweep.batch_size)
    config = PruneConfig(wavelet="dct", sparsity=0.9, device=sweep.device)
    expected = run_trial(model, data, config, batchnorm="off", calibrated="refit", timing=False)
    row = rows[(rows["calibrated"] == "refit") & (rows["sparsity_requested"] == 0.9)].iloc[0]
    assert expected.report is not None
    assert row["kept"] == expected.report.kept
    assert row["loss"] == pytest.approx(expected.evaluation.loss, rel=1e-5)
    assert row["batchnorm"] == "off"


def test_a_warning_of_many_runs_is_said_once(root: Path, db: Path) -> None:
    grid = {"wavelet": "bior4.4", "level": 5, "sparsity": [0.5, 0.9]}
    with pytest.warns(LevelCollapsedWarning, match=r"'bior4\.4' is too long") as caught:
        run_sweep(sweeps.sweep(root, sweeps.content(grid=grid)), db, jobs=1)
    assert len(caught) == 1
    with Store(db) as store:
        assert (store.layers()["level_used"] == 0).all()


def test_a_warning_of_a_networks_own_kind_reaches_the_caller(tmp_path: Path, db: Path) -> None:
    sweeps.folder(tmp_path)
    text = """
import warnings
class OwnWarning(UserWarning):
    pass
class Net(Net):
    def forward(self, x):
        warnings.warn("a word", OwnWarning)
        return super().forward(x)
"""
    (tmp_path / "net.py").write_text(sweeps.MODULE + text)
    content = sweeps.content(model={"factory": "net:Net"}, grid={"sparsity": [0.5, 0.6]})
    with pytest.warns(UserWarning, match="a word") as caught:
        assert run_sweep(sweeps.sweep(tmp_path, content), db, jobs=2).failed == 0
    assert len(caught) == 1


def test_a_failed_run_is_a_row_with_its_error(
    root: Path, db: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(sweeps.BROKEN, "1")
    grid = {"method": ["dwt", "min_weight"], "wavelet": "dct", "sparsity": [0.5, 0.9, 0.95]}
    sweep = sweeps.sweep(root, sweeps.content("Breakable", grid=grid))
    summary = run_sweep(sweep, db, jobs=1)
    frame = runs(db)
    bad = frame[frame["status"] == "failed"]
    assert (summary.ok, summary.failed) == (5, 2)
    assert set(bad["error"]) == {"RuntimeError: this network is broken"}
    assert bad["traceback"].str.contains("in forward").all()
    assert bad["method"].tolist() == ["min_weight"] * 2
    assert bad["sparsity_requested"].tolist() == [0.9, 0.95]
    monkeypatch.delenv(sweeps.BROKEN)
    assert run_sweep(sweep, db, jobs=1).known == 7
    assert runs(db)["status"].tolist().count("failed") == 2
    again = run_sweep(sweep, db, jobs=1, retry_failed=True)
    assert (again.ok, again.known) == (2, 5)
    assert runs(db)["status"].tolist() == ["ok"] * 7


def test_a_network_that_exits_is_a_failed_row_and_ends_nothing(root: Path, db: Path) -> None:
    grid = {"method": "min_weight", "sparsity": [0.3, 0.95]}
    summary = run_sweep(sweeps.sweep(root, sweeps.content("Quitting", grid=grid)), db, jobs=1)
    assert (summary.ok, summary.failed) == (2, 1)
    assert runs(db)["error"].dropna().tolist() == ["SystemExit: 0"]


def test_a_weight_that_is_not_finite_fails_every_run_that_prunes_it(root: Path, db: Path) -> None:
    grid = {"method": ["dwt", "min_weight"], "wavelet": "haar", "matched": ["", "kept"]}
    summary = run_sweep(sweeps.sweep(root, sweeps.content("Unfinished", grid=grid)), db, jobs=1)
    assert (summary.ok, summary.failed) == (1, 3)
    errors = runs(db).query("method != 'none'")["error"]
    assert errors.str.contains("layer 'spare': 9 of 576 weights are NaN or infinite").all()


@pytest.mark.parametrize("jobs", [1, 2])
def test_the_parts_of_the_time_are_all_of_it(root: Path, db: Path, jobs: int) -> None:
    content = sweeps.content(batchnorm=["off", "match"])
    start = time.perf_counter()
    summary = run_sweep(sweeps.sweep(root, content), db, jobs=jobs)
    wall = time.perf_counter() - start
    assert (summary.ok, summary.processes) == (9, jobs)
    assert summary.seconds <= wall
    assert sum(summary.parts.values()) == pytest.approx(jobs * summary.seconds)
    assert {*summary.parts} <= {*PARTS, "waiting"}
    for part in ("forward", "moments", "pruning", "metrics", "reference", "loading", "waiting"):
        assert summary.parts[part] > 0
    frame = runs(db)
    # What a run says of itself is part of it.
    assert summary.parts["pruning"] >= 0.95 * frame["prune_seconds"].sum()
    evaluated = summary.parts["forward"] + summary.parts["metrics"] + summary.parts["loading"]
    assert evaluated >= 0.8 * frame["evaluate_seconds"].sum()
    assert summary.runs_per_hour == pytest.approx(9 * 3600 / summary.seconds)


def test_batches_are_loaded_once_for_all_models_and_no_longer_kept_than_the_sweep(
    tmp_path: Path, db: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sweeps.folder(tmp_path)
    loaded: list[int] = []
    monkeypatch.setattr(worker, "load_data", lambda source, size: _logged(source, size, loaded))
    models = [{"factory": "module:Net", "name": str(i), "seed": i} for i in range(3)]
    content = sweeps.content(
        models=models,
        batchnorm=["off", "match"],
        batch_size=16,
        calibration={"npz": "data.npz", "limit": 24},
    )
    content.pop("model")
    run_sweep(sweeps.sweep(tmp_path, content), db, jobs=1)
    assert loaded == [16, 16]
    run_sweep(sweeps.sweep(tmp_path, {**content, "batch_size": 32}), db, jobs=1)
    assert loaded == [16, 16, 32, 32]
    run_sweep(sweeps.sweep(tmp_path, content), tmp_path / "again.db", jobs=1)
    assert loaded == [16, 16, 32, 32, 16, 16]
    with Store(tmp_path / "again.db") as store:
        again = measured(store.runs())
    frame = runs(db)
    pd.testing.assert_frame_equal(
        again, measured(frame[frame["guid"].isin(again["guid"])]), check_index_type=False
    )


def _logged(source: Any, size: int, loaded: list[int]) -> Any:
    loaded.append(size)
    return load_data(source, size)


def test_data_that_is_too_large_is_read_again_each_time(
    root: Path, db: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = db.with_name("before.db")
    run_sweep(sweeps.sweep(root), before, jobs=1)
    kept = worker._data.bytes
    monkeypatch.setattr(worker, "CACHED_BYTES", 100)
    run_sweep(sweeps.sweep(root), db, jobs=1)
    assert worker._data.bytes <= kept
    pd.testing.assert_frame_equal(measured(runs(db)), measured(runs(before)))


THREADS = """
import torch
from tests.support.sweeps import Net
class Threaded(Net):
    def forward(self, x):
        assert torch.get_num_threads() == EXPECTED
        return super().forward(x)
"""


@pytest.mark.parametrize(
    ("cores", "jobs", "threads"), [(6, 1, 6), (4, 2, 2), (2, 3, 1), (6, 4, 2), (6, None, 2)]
)
def test_the_processes_share_the_cores(
    tmp_path: Path,
    db: Path,
    monkeypatch: pytest.MonkeyPatch,
    cores: int,
    jobs: int | None,
    threads: int,
) -> None:
    monkeypatch.setattr(joblib, "cpu_count", lambda: cores)
    sweeps.folder(tmp_path)
    text = sweeps.MODULE + THREADS.replace("EXPECTED", str(threads))
    (tmp_path / "net.py").write_text(text)
    content = sweeps.content(model={"factory": "net:Threaded"}, grid={"sparsity": [0.5, 0.6]})
    before = torch.get_num_threads()
    # Three runs, so never more than three at a time.
    summary = run_sweep(sweeps.sweep(tmp_path, content), db, jobs=jobs)
    assert (summary.ok, summary.failed) == (3, 0)
    assert summary.processes == (jobs or 3)
    assert torch.get_num_threads() == before


NETWORK = """
import torch
from tests.support.sweeps import Net, loader
class Edited(Net):
    def forward(self, x):
        return super().forward(x) * FACTOR
"""


@pytest.mark.parametrize("jobs", [1, 2])
def test_an_edited_network_is_measured_as_it_is_now(tmp_path: Path, db: Path, jobs: int) -> None:
    sweeps.folder(tmp_path)
    grid = {"method": "min_weight", "sparsity": [0.5, 0.6]}
    content = sweeps.content(model={"factory": "net:Edited"}, grid=grid)
    for factor in (1, 2):
        text = sweeps.MODULE + NETWORK.replace("FACTOR", str(factor))
        (tmp_path / "net.py").write_text(text)
        summary = run_sweep(sweeps.sweep(tmp_path, content), db, jobs=jobs)
        assert (summary.ok, summary.known) == (3, 0)
    frame = runs(db)
    pairs = frame.groupby(frame["sparsity_requested"].fillna(0))["loss"]
    assert (pairs.nunique() == 2).all()
    assert (frame["guid"].nunique(), frame["relative_error"].nunique()) == (6, 2)


def test_a_network_that_changes_during_a_sweep_is_not_measured(
    tmp_path: Path, db: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sweeps.folder(tmp_path)
    numbers = iter(range(10))
    monkeypatch.setattr(sweeps, "next_number", lambda: next(numbers), raising=False)
    (tmp_path / "net.py").write_text(
        "from tests.support import sweeps\n"
        "def make():\n    return sweeps.Net(4 + sweeps.next_number())\n"
    )
    content = sweeps.content(model={"factory": "net:make"}, grid={"sparsity": 0.5})
    assert run_sweep(sweeps.sweep(tmp_path, content), db, jobs=1).failed == 2
    assert runs(db)["error"].str.contains("is not the one that the sweep started with").all()


def test_a_run_that_kills_its_process_is_a_failed_row_and_ends_no_other(
    root: Path, db: Path
) -> None:
    grid = {"method": "min_weight", "sparsity": [0.3, 0.5, 0.95, 0.6, 0.7]}
    sweep = sweeps.sweep(root, sweeps.content("Deadly", grid=grid))
    summary = run_sweep(sweep, db, jobs=2)
    assert (summary.ok, summary.failed) == (5, 1)
    frame = runs(db)
    bad = frame[frame["status"] == "failed"]
    assert bad["sparsity_requested"].tolist() == [0.95]
    assert bad["error"].tolist() == ["the process died (killed, or out of memory)"]


def test_a_killed_sweep_goes_on_where_it_ended(
    root: Path, db: Path, tmp_path: Path, started: list[subprocess.Popen[str]]
) -> None:
    content = sweeps.content("Slow", grid={"wavelet": "haar", "sparsity": MANY})
    total = 1 + len(MANY)
    process = subprocess.Popen(command(root, content, db, "--jobs", "2"), text=True)
    started.append(process)
    until(lambda: db.exists() and len(runs(db)) >= 3)
    workers = children(process.pid)
    assert len(workers) >= 2
    process.kill()
    process.wait()
    before = runs(db)
    assert 3 <= len(before) < total, "it was killed too late"
    until(lambda: not alive(workers))
    sweep = sweeps.sweep(root, content)
    summary = run_sweep(sweep, db, jobs=1)
    assert (summary.known, summary.ok) == (len(before), total - len(before))
    after = runs(db)
    assert after["guid"].is_unique
    pd.testing.assert_frame_equal(after.iloc[: len(before)], before)
    # What other processes did with other numbers of threads is what this one does.
    run_sweep(sweep, tmp_path / "fresh.db", jobs=1)
    pd.testing.assert_frame_equal(measured(after), measured(runs(tmp_path / "fresh.db")))


def test_ctrl_c_ends_it_and_keeps_what_finished(
    root: Path, db: Path, started: list[subprocess.Popen[str]]
) -> None:
    content = sweeps.content("Slow", grid={"method": "min_weight", "sparsity": MANY})
    process = subprocess.Popen(
        command(root, content, db, "--jobs", "2"),
        stderr=subprocess.PIPE,
        text=True,
        # As a terminal does it: the interrupt goes to the workers too.
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    started.append(process)
    until(lambda: db.exists() and len(runs(db)) >= 2)
    workers = children(process.pid)
    os.killpg(process.pid, signal.SIGINT)
    _, err = process.communicate(timeout=300)
    assert process.returncode == 130
    assert err.splitlines()[-1] == "wavprune: error: interrupted"
    assert "Traceback" not in err
    until(lambda: not alive(workers))
    assert 2 <= len(runs(db)) <= len(MANY)


def test_two_sweeps_share_a_file(
    root: Path, db: Path, started: list[subprocess.Popen[str]]
) -> None:
    grids = [
        {"method": "min_weight", "sparsity": MANY[part]} for part in (slice(20), slice(10, 29))
    ]
    for grid in grids:
        line = command(root, sweeps.content(grid=grid), db, "--jobs", "1", "--json")
        started.append(subprocess.Popen(line, stdout=subprocess.PIPE, text=True))
    told = [json.loads(process.communicate(timeout=300)[0]) for process in started]
    assert [each["failed"] for each in told] == [0, 0]
    assert [each["runs"] for each in told] == [21, 20]
    frame = runs(db)
    assert frame["guid"].is_unique
    assert sorted(frame["sparsity_requested"].dropna()) == MANY


@pytest.mark.parametrize("cluster", ["ray", "dask"])
def test_a_cluster_of_two_workers_does_the_same(root: Path, db: Path, cluster: str) -> None:
    pytest.importorskip(cluster)
    sweep = sweeps.sweep(root)
    line = command(root, sweeps.content(), db, "--cluster", cluster, "--jobs", "2", "--json")
    done = subprocess.run(line, stdout=subprocess.PIPE, text=True, check=True, timeout=300)
    assert json.loads(done.stdout)["ok"] == 5
    here = db.with_name("here.db")
    run_sweep(sweep, here, jobs=1)
    pd.testing.assert_frame_equal(measured(runs(db)), measured(runs(here)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"jobs": 0}, "jobs must be an integer, 1 or more, not 0"),
        ({"cluster": "slurm"}, "unknown cluster 'slurm'; allowed: ray, dask"),
        ({"address": "1.2.3.4:5"}, "address='1.2.3.4:5' is a cluster's; name it: ray, dask"),
    ],
)
def test_a_wrong_argument_is_said_before_anything_runs(
    root: Path, db: Path, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message.replace(".", r"\.")):
        run_sweep(sweeps.sweep(root), db, **options)
    assert not db.exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"data": {"npz": "none.npz"}}, "none.npz does not exist"),
        ({"calibration": {"npz": "none.npz"}, "batchnorm": "match"}, "none.npz does not exist"),
        ({"model": {"directory": "none"}}, "holds no config.json"),
    ],
)
def test_missing_models_and_data_are_said_before_anything_runs(
    root: Path, db: Path, change: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        run_sweep(sweeps.sweep(root, sweeps.content(**change)), db)
    assert not db.exists()


def test_resnet_18_from_a_hugging_face_config(root: Path, db: Path) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.ResNetConfig(
        num_channels=1,
        embedding_size=64,
        hidden_sizes=[64, 128, 256, 512],
        depths=[2, 2, 2, 2],
        layer_type="basic",
        num_labels=4,
    )
    config.architectures = ["ResNetForImageClassification"]
    config.save_pretrained(root / "resnet18")
    grid = {"wavelet": "uhaar", "sparsity": 0.5}
    content = sweeps.content(model={"directory": "resnet18"}, grid=grid, batchnorm="match")
    sweep = sweeps.sweep(root, content)
    assert run_sweep(sweep, db, jobs=1).failed == 0
    row = runs(db).iloc[1]
    assert row[["model", "numel", "kept"]].tolist() == ["resnet18", 11_160_640, 5_580_320]
    assert expand(sweep)[1].config == PruneConfig(wavelet="uhaar", sparsity=0.5)
