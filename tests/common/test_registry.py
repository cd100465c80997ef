from __future__ import annotations

import sys
from types import ModuleType

import pytest

from wavprune.common.optional import require
from wavprune.common.progress import progress_bar
from wavprune.common.registry import Registry
from wavprune.errors import WavpruneError


def test_an_unknown_name_is_repeated() -> None:
    registry = Registry[int]("coder")
    registry.register("ans", 1)
    with pytest.raises(WavpruneError, match="unknown coder 'zip'; allowed: ans"):
        registry["zip"]
    registry.unregister("ans")
    assert "ans" not in registry


def test_the_home_is_imported_when_the_registry_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    registry = Registry[int]("coder", home="wavprune_test_home")
    registry.register("mine", 2)
    with pytest.raises(ImportError):
        list(registry)
    again = Registry[int]("coder", home="wavprune_test_home")
    monkeypatch.setitem(sys.modules, "wavprune_test_home", ModuleType("wavprune_test_home"))
    again.register("mine", 2)
    assert dict.fromkeys(again) == {"mine": None}


def test_a_missing_extra_says_what_to_install() -> None:
    with pytest.raises(
        ImportError, match=r"pictures needs no_such_module; pip install 'wavprune\[report\]'"
    ):
        require("json", "no_such_module", extra="report", purpose="pictures")


def test_a_bar_goes_to_standard_error(capsys: pytest.CaptureFixture[str]) -> None:
    with progress_bar("prune", 4, unit="layers") as advance:
        advance(4)
    out, err = capsys.readouterr()
    assert out == ""
    assert "prune" in err
    assert "4/4 layers" in err
