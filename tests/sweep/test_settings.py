from __future__ import annotations

import json
import subprocess
import sys
import uuid
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from wavprune import PruneConfig
from wavprune.sweep import schema
from wavprune.sweep.grid import Run, expand
from wavprune.sweep.settings import parse_sweep, read_sweep
from wavprune.sweep.sources import FolderData

GRID = {"method": ["dwt", "min_weight", "random"], "wavelet": ["haar", "dct"], "sparsity": 0.8}
METHODS = st.lists(st.sampled_from(["dwt", "min_weight", "random"]), min_size=1, max_size=4)


def told(**settings: Any) -> dict[str, Any]:
    return {"model": "demo", "data": "demo", "grid": GRID, **settings}


def configs(**settings: Any) -> list[PruneConfig]:
    return [run.config for run in expand(parse_sweep(told(**settings))) if run.config]


def guid(run: Run, **identities: str) -> str:
    return run.guid(identities, {})


def test_a_setting_multiplies_only_the_runs_of_methods_that_read_it() -> None:
    found = configs(grid={**GRID, "seed": [0, 1], "mode": ["zero", "symmetric"], "level": [1, 2]})
    counts = [
        (method, wavelet, sum(c.method == method and c.wavelet == wavelet for c in found))
        for method, wavelet in (("dwt", "haar"), ("dwt", "dct"), ("random", "uhaar"))
    ]
    assert counts == [("dwt", "haar", 4), ("dwt", "dct", 1), ("random", "uhaar", 2)]
    assert sum(config.method == "min_weight" for config in found) == 1


@given(METHODS, st.lists(st.sampled_from([0.1, 0.5, 0.9]), min_size=1, max_size=4))
def test_each_run_is_there_once_and_the_order_is_always_the_same(
    methods: list[str], sparsities: list[float]
) -> None:
    sweep = parse_sweep(told(grid={"method": methods, "sparsity": sparsities}))
    runs = expand(sweep)
    assert runs == expand(sweep)
    assert len({guid(run) for run in runs}) == len(runs)
    assert len(runs) == 1 + len(set(methods)) * len(set(sparsities))
    assert runs[0].config is None


def test_blocks_are_a_union() -> None:
    other = {"method": "dwt", "wavelet": ["haar", "db2"], "sparsity": 0.8}
    assert len(configs(grid=[GRID, other])) == len(configs()) + 1


def test_every_model_is_tried_unpruned_first() -> None:
    models = [{"builtin": "demo"}, {"builtin": "demo", "seed": 1}]
    sweep = parse_sweep({"models": models, "data": "demo", "grid": {}})
    assert [(run.model.label, run.config is None) for run in expand(sweep)] == [
        ("demo", True),
        ("demo", False),
        ("demo-1", True),
        ("demo-1", False),
    ]


def test_off_is_read_as_a_word_although_yaml_takes_it_for_false(tmp_path: Path) -> None:
    path = tmp_path / "sweep.yaml"
    path.write_text("model: demo\ndata: demo\nbatchnorm: [off, match]\ngrid: {sparsity: 0.5}\n")
    assert [run.batchnorm for run in expand(read_sweep(path))] == ["off", "off", "match"]


def test_paths_are_relative_to_the_file(tmp_path: Path) -> None:
    path = tmp_path / "sweep.yaml"
    path.write_text("model: demo\ndata: {images: pictures, size: 32}\ngrid: {}\n")
    data = read_sweep(path).data
    assert isinstance(data, FolderData)
    assert data.images == tmp_path / "pictures"


def test_targets_are_one_set_of_patterns_or_several() -> None:
    one = configs(grid={"targets": ["a", "b"]})
    assert [config.targets for config in one] == [("a", "b")]
    several = configs(grid={"targets": [["a", "b"], ["c"], None]})
    assert [config.targets for config in several] == [("a", "b"), ("c",), None]


def test_kept_matches_the_other_methods_to_each_dwt_run() -> None:
    grid = {**GRID, "sparsity": None, "percentile": [50, 70], "matched": "kept"}
    runs = expand(parse_sweep(told(grid=grid)))
    followers = [run for run in runs if run.matched]
    pairs = {
        (run.config.method, run.match.wavelet, run.match.percentile)
        for run in followers
        if run.config and run.match
    }
    assert len(followers) == len(pairs) == 8
    assert all(run.config and run.config.percentile is None for run in followers)
    assert {schema.values(schema.SETTINGS, run)["sparsity_requested"] for run in followers} == {
        None
    }


def test_bytes_matches_each_dwt_run_to_min_weight() -> None:
    runs = expand(parse_sweep(told(grid={**GRID, "matched": ["", "bytes"]})))
    matched = [run for run in runs if run.matched == "bytes"]
    assert [run.config.wavelet for run in matched if run.config] == ["haar", "dct"]
    assert all(run.match and run.match.method == "min_weight" for run in matched)
    assert len(runs) == 1 + 4 + 2


def test_calibrated_runs_repair_themselves_and_random_ones_are_none() -> None:
    grid = {**GRID, "wavelet": "dct", "calibrated": ["", "refit", "full"]}
    sweep = told(grid=grid, batchnorm=["match", "off"], calibration={"npz": "x.npz"})
    runs = [run for run in expand(parse_sweep(sweep)) if run.config]
    found = [(run.config.method, run.calibrated, run.batchnorm) for run in runs if run.config]
    for method in ("dwt", "min_weight"):
        of_method = [entry[1:] for entry in found if entry[0] == method]
        assert of_method == [("", "match"), ("", "off"), ("refit", "off"), ("full", "off")]
    assert [entry[1:] for entry in found if entry[0] == "random"] == [("", "match"), ("", "off")]
    assert all(run.calibration for run in runs if run.calibrated)
    plain = expand(parse_sweep({**sweep, "grid": {**grid, "calibrated": ""}}))
    assert {guid(run) for run in plain} <= {guid(run) for run in expand(parse_sweep(sweep))}


def test_the_id_is_a_uuid_of_what_the_result_depends_on() -> None:
    run = expand(parse_sweep(told()))[1]
    assert uuid.UUID(guid(run)).version == 5
    assert guid(run, model="a") == guid(run, model="a") != guid(run, model="b")
    assert run.guid({}, {"torch": "1"}) != run.guid({}, {"torch": "2"})
    for change in ({"batch_size": 7}, {"timing": True}, {"device": "cpu"}, {"batchnorm": "off"}):
        assert guid(expand(parse_sweep(told(**change)))[1]) != guid(run)


def test_names_do_not_change_the_id() -> None:
    named = told(name="other", data={"builtin": "demo", "name": "digits"})
    ids = [[guid(run) for run in expand(parse_sweep(each))] for each in (told(), named)]
    assert ids[0] == ids[1]


def test_settings_are_ready_for_json() -> None:
    for run in expand(parse_sweep(told(calibration={"npz": "x.npz"}, grid={"targets": "a"}))):
        assert json.loads(json.dumps(run.settings())).keys() == run.settings().keys()


MISTAKES: list[tuple[dict[str, Any], str]] = [
    (told(model="resnet"), "model[0].builtin: Input should be 'demo' or 'demo-mlp', not 'resnet'"),
    (told(model={"path": "x"}), "model[0]: allowed: demo, or a mapping with one of builtin, direc"),
    (told(model={"builtin": "demo", "seeds": 1}), "model[0].seeds: unknown key; allowed: name, bu"),
    (told(model=["demo", "demo"]), "several models are called 'demo'; give each a name"),
    (told(models="demo"), "model and models were both given"),
    (told(data={"npz": "x", "factory": "y:z"}), "data: allowed: demo, or a mapping with one of"),
    (told(data={"npz": 3}), "data.npz: Value error, Input should be a path, not 3"),
    (told(data={"images": "x", "std": 0}), "data.std[0]: Input should be greater than 0, not 0"),
    (told(data={"factory": "no"}), "data.factory: String should match pattern"),
    (told(batchnorm="of"), "batchnorm[0]: Input should be 'off', 'update' or 'match', not 'of'"),
    (told(batch_size="8"), "batch_size: Input should be a valid integer, not '8'"),
    (told(batch_size=0), "batch_size: Input should be greater than or equal to 1, not 0"),
    (told(spartsity=1), "spartsity: unknown key; allowed: name, models, data"),
    (told(grid=[GRID, {"wavelets": "haar"}]), "grid[1].wavelets: unknown key; allowed: method"),
    (told(grid=[]), "grid: Value should have at least 1 item"),
    (told(grid={"method": []}), "grid[0].method: Value should have at least 1 item"),
    (told(grid={"wavelet": "harr"}), "grid[0]: unknown wavelet 'harr'; close to it: haar"),
    (told(grid={"sparsity": "1e-1"}), "grid[0]: sparsity must be a number, not '1e-1'"),
    (told(grid={"sparsity": [0.5, 1.5]}), "grid[0]: sparsity must be in [0, 1), not 1.5"),
    (told(grid={"sparsity": 0.5, "percentile": 5}), "grid[0]: sparsity=0.5 and percentile=5 were"),
    (told(grid={"targets": 3}), "grid[0].targets[0][0]: Input should be a valid string, not 3"),
    (told(grid={"calibrated": "all"}), "'', 'refit', 'select', 'sequential' or 'full', not 'all'"),
    (told(grid={"calibrated": "full", "percentile": 50}), "ranks magnitudes"),
    (told(grid={"method": "random", "matched": "kept"}), "matched='kept' needs a dwt run"),
    (told(backend="foo"), "unknown backend 'foo'; allowed: auto, native"),
    (told(device="foo"), "unknown device 'foo'"),
]


@pytest.mark.parametrize(("content", "message"), MISTAKES, ids=[m for _, m in MISTAKES])
def test_a_mistake_names_the_key_the_value_and_what_is_allowed(
    content: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=r"^here\.yaml: ") as caught:
        parse_sweep(content, where="here.yaml")
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [", "is not YAML"),
        ("model: demo\nmodel: demo\n", "'model' is there twice"),
        ("a: !!python/object/apply:os.getcwd []\n", "is not YAML"),
        ("- demo", "the file: Input should be a valid dictionary"),
    ],
)
def test_a_broken_file_says_so(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "sweep.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=message) as caught:
        read_sweep(path)
    assert str(path) in str(caught.value)


def test_a_missing_file_says_so(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"none\.yaml: No such file"):
        read_sweep(tmp_path / "none.yaml")


def test_the_former_name_of_the_package_still_works() -> None:
    script = (
        "from wavprune.experiment.settings import parse_sweep\n"
        "from wavprune.experiment.models import load_model\n"
        "import wavprune.sweep.models\n"
        "sweep = parse_sweep({'model': 'demo', 'data': 'demo', 'grid': {}})\n"
        "load_model(sweep.models[0])\n"
        "assert load_model is wavprune.sweep.models.load_model\n"
    )
    subprocess.run([sys.executable, "-W", "error", "-c", script], check=True)
