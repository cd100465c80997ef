from __future__ import annotations

import importlib
import os
import sys
from pathlib import Path
from typing import Any

import pytest

from wavprune.sweep.factories import call_factory, factory_digest
from wavprune.sweep.sources import FactoryData


def source(root: Path, factory: str = "nets:make", **arguments: Any) -> FactoryData:
    told = {"factory": factory, "arguments": arguments}
    return FactoryData.model_validate(told, context={"root": root})


def write(root: Path, **files: str) -> Path:
    """Modules of a folder, by their names with ``__`` for ``/``."""
    for name, text in files.items():
        path = root / f"{name.replace('__', '/')}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def returns(value: object) -> str:
    return f"def make():\n    return {value!r}\n"


def test_two_folders_may_have_modules_of_one_name(tmp_path: Path) -> None:
    text = "from helpers import VALUE\ndef make():\n    return VALUE\n"
    one = write(tmp_path / "one", nets=text, helpers="VALUE = 1")
    two = write(tmp_path / "two", nets=text, helpers="VALUE = 2")
    found = [call_factory(source(root)) for root in (one, two, one)]
    assert found == [1, 2, 1]
    assert factory_digest(source(one)) != factory_digest(source(two))


@pytest.mark.parametrize("edited", ["nets", "helpers", "late"])
def test_an_edited_file_is_imported_again(tmp_path: Path, edited: str) -> None:
    nets = """
import helpers
A = 1
def make():
    import late
    return [A, helpers.A, late.A]
"""
    write(tmp_path, nets=nets, helpers="A = 1", late="A = 1")
    assert call_factory(source(tmp_path)) == [1, 1, 1]
    before = factory_digest(source(tmp_path))
    path = tmp_path / f"{edited}.py"
    status = path.stat()
    # As large and as old as before, as an edit within a second of the first import is.
    path.write_text(path.read_text().replace("A = 1", "A = 2"))
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    expected = [2 if name == edited else 1 for name in ("nets", "helpers", "late")]
    assert call_factory(source(tmp_path)) == expected
    assert (factory_digest(source(tmp_path)) != before) == (edited != "late")


def test_an_unchanged_module_is_imported_once(tmp_path: Path) -> None:
    """Modules that register something would fail the second time."""
    registry = "CALLS = []\ndef make():\n    CALLS.append(1)\n    return len(CALLS)\n"
    write(tmp_path, nets=registry)
    assert [call_factory(source(tmp_path)) for _ in range(3)] == [1, 2, 3]


def test_packages_with_and_without_init_are_found(tmp_path: Path) -> None:
    write(tmp_path, plain__nets="from . import more\nmake = more.make\n", plain__more=returns(1))
    write(
        tmp_path, full____init__="", full__nets="from full.more import make", full__more=returns(2)
    )
    assert call_factory(source(tmp_path, "plain.nets:make")) == 1
    assert call_factory(source(tmp_path, "full.nets:make")) == 2


def test_modules_elsewhere_are_found_and_those_of_the_folder_come_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    elsewhere = write(tmp_path / "elsewhere", nets=returns(1), other=returns(2))
    here = write(tmp_path / "here", nets=returns(3))
    monkeypatch.syspath_prepend(elsewhere)
    imported = importlib.import_module("nets")
    assert call_factory(source(here)) == 3
    assert sys.modules["nets"] is imported
    assert call_factory(source(here, "other:make")) == 2
    monkeypatch.delitem(sys.modules, "nets")
    monkeypatch.delitem(sys.modules, "other")


def test_a_file_named_like_a_standard_module_is_not_taken_for_it(tmp_path: Path) -> None:
    text = "import random, json\ndef make():\n    return random.random() + len(json.dumps(1))\n"
    write(tmp_path, nets=text, random="raise SystemExit", json="")
    assert 1 <= call_factory(source(tmp_path)) < 2


def test_the_interpreter_is_left_as_it_was(tmp_path: Path) -> None:
    text = (
        "import sys\nsys.path.append('x')\nimport helpers\ndef make():\n    sys.path.append('y')\n"
    )
    write(tmp_path, nets=text, helpers="", broken="import helpers\nraise KeyError('x')")
    path, names, finders = list(sys.path), set(sys.modules), list(sys.meta_path)
    call_factory(source(tmp_path))
    with pytest.raises(ValueError, match="KeyError"):
        call_factory(source(tmp_path, "broken:make"))
    assert sys.path == path
    assert set(sys.modules) == names
    assert sys.meta_path == finders


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("import sys\nsys.exit(3)", r"its module called sys\.exit\(3\) at nets\.py:2"),
        ("import sys\ndef make():\n    sys.exit()", r"called sys\.exit\(None\) at nets\.py:3"),
        ("def make():\n    return {}['x']", r"failed at nets\.py:2: KeyError: 'x'"),
        ("def make(a):\n    return a", "failed: TypeError: make.* missing 1 required"),
        ("def make(:", "cannot be imported: its module failed: SyntaxError"),
        ("import no_such_module", "cannot be imported: No module named 'no_such_module'"),
        ("x = 1", "cannot be imported: module 'nets' has no attribute 'make'"),
        ("make = 1", "is a int, not a function"),
    ],
)
def test_whatever_a_factory_does_is_said_and_ends_nothing(
    tmp_path: Path, text: str, message: str
) -> None:
    write(tmp_path, nets=text)
    with pytest.raises((ValueError, TypeError), match=f"factory 'nets:make' .*{message}"):
        call_factory(source(tmp_path))
