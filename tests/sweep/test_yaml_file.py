from __future__ import annotations

import os
from pathlib import Path

import pytest

from wavprune.sweep.grid import expand
from wavprune.sweep.settings import read_sweep
from wavprune.sweep.yaml_file import read_yaml


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "sweep.yaml"


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-3", 0.001),
        ("5e-1", 0.5),
        ("1E5", 1e5),
        ("1.5e3", 1500.0),
        (".5e-1", 0.05),
        ("-2e+1", -20.0),
        ("1.5", 1.5),
        ("12", 12),
        ("0x1e5", 0x1E5),
        ("1e", "1e"),
        ("e5", "e5"),
        ("'1e-3'", "1e-3"),
        ("0.1.2e3", "0.1.2e3"),
    ],
)
def test_numbers_are_those_of_yaml(path: Path, text: str, value: object) -> None:
    path.write_text(f"x: {text}\n")
    found = read_yaml(path)["x"]
    assert (found, type(found)) == (value, type(value))


def test_merge_keys_are_merged_and_own_keys_win(path: Path) -> None:
    path.write_text(
        """
a: &a {x: 1, y: 1}
b: &b
  <<: *a
  y: 2
c: {<<: [*b, {x: 3, z: 3}], x: 4}
"""
    )
    assert read_yaml(path) == {
        "a": {"x": 1, "y": 1},
        "b": {"x": 1, "y": 2},
        "c": {"x": 4, "y": 2, "z": 3},
    }


def test_a_sweep_may_use_both(path: Path) -> None:
    path.write_text(
        """
model: demo
data: demo
grid:
  - &base {method: dwt, wavelet: uhaar, sparsity: [5e-1, 9e-1], scope: global}
  - {<<: *base, wavelet: dct}
"""
    )
    configs = [run.config for run in expand(read_sweep(path)) if run.config]
    assert [(config.wavelet, config.sparsity) for config in configs] == [
        ("uhaar", 0.5),
        ("uhaar", 0.9),
        ("dct", 0.5),
        ("dct", 0.9),
    ]
    assert {config.scope for config in configs} == {"global"}


BOMB = "a0: &a0 [x, x]\n" + "".join(
    f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 12)
)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("x: 1\ny: {a: 1, b: 2, a: 3}\n", "the key 'a' is there twice"),
        ("x: 1\n'x': 2\n", "the key 'x' is there twice"),
        (BOMB, "aliases stand for more than 100,000 values"),
        ("a: &a [1, *a]", "a value contains itself"),
        ("a: &a {<<: *a}", "a value contains itself"),
        ("[" * 1000, "nested more than 100 deep"),
        ("a: {<<: 1}", "only mappings can be merged"),
        ("? [a]\n: 1", "unhashable key"),
        ("x: " + "y" * 2**20, "larger than 1,048,576 bytes"),
    ],
)
def test_what_cannot_be_meant_is_refused(path: Path, text: str, message: str) -> None:
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        read_yaml(path)


def test_a_pipe_is_not_waited_for(path: Path) -> None:
    os.mkfifo(path)
    with pytest.raises(ValueError, match="is not a file"):
        read_yaml(path)
