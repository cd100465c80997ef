"""Running the command line in tests."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from wavprune.cli import main


def listing() -> set[str]:
    """The names in the working directory."""
    return {path.name for path in Path.cwd().iterdir()}


def json_of(capsys: pytest.CaptureFixture[str], *args: str) -> dict[str, object]:
    """What a command prints with ``--json``, and nothing beside it."""
    assert main([*args, "--json"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    content = json.loads(out)
    assert isinstance(content, dict)
    return content


def cells(table: str) -> list[list[str]]:
    """The cells of a printed table, by row."""
    return [[cell.strip() for cell in line.split("│")[1:-1]] for line in table.splitlines()]
