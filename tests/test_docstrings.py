from __future__ import annotations

import doctest
import importlib
import pkgutil

import pytest

import wavprune

MODULES = [
    "wavprune",
    *(found.name for found in pkgutil.walk_packages(wavprune.__path__, "wavprune.")),
]


@pytest.mark.parametrize("name", [name for name in MODULES if not name.endswith("__main__")])
def test_the_examples_do_what_they_say(name: str) -> None:
    try:
        module = importlib.import_module(name)
    except ImportError as error:
        pytest.skip(str(error))
    assert doctest.testmod(module).failed == 0
