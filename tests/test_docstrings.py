from __future__ import annotations

import doctest
import importlib
import inspect
import pkgutil
from collections.abc import Iterator
from types import ModuleType

import pytest

import wavprune

MODULES = [
    "wavprune",
    *(module.name for module in pkgutil.walk_packages(wavprune.__path__, "wavprune.")),
]

# The result depends on the machine, on files or on a trained network; no new ones.
WITHOUT_EXAMPLE = {
    "backends.check_name",
    "backends.register",
    "backends.resolve",
    "backends.unavailable",
    "bases.register",
    "checkpoint.decompress",
    "checkpoint.load",
    "demo.weights_path",
    "ops.cuda_architectures",
    "ops.instruction_set",
    "plots.error_by_layer",
    "plots.sparsity_by_layer",
    "prune_layers",
}


@pytest.mark.parametrize("name", [name for name in MODULES if not name.endswith("__main__")])
def test_the_examples_do_what_they_say(name: str) -> None:
    try:
        module = importlib.import_module(name)
    except ImportError as error:
        pytest.skip(str(error))
    assert doctest.testmod(module).failed == 0


def test_every_public_function_has_an_example() -> None:
    missing = {name for name, function in public_functions() if ">>>" not in str(function.__doc__)}
    assert missing <= WITHOUT_EXAMPLE


def public_functions() -> Iterator[tuple[str, object]]:
    """The functions that users are told of, by the name under which they reach them."""
    for name in wavprune.__all__:
        value = getattr(wavprune, name)
        if not isinstance(value, ModuleType):
            members = {name: value}
        elif hasattr(value, "__all__"):
            members = {f"{name}.{member}": getattr(value, member) for member in value.__all__}
        else:
            members = {
                f"{name}.{member}": entry
                for member, entry in vars(value).items()
                if not member.startswith("_") and inspect.getmodule(entry) is value
            }
        yield from ((key, entry) for key, entry in members.items() if inspect.isfunction(entry))
