from __future__ import annotations

from typing import Any

import pytest

from tests.support.commands import cells, json_of
from wavprune.bases import named_basis
from wavprune.cli import main


def test_bases_shows_what_each_is_like(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bases", "--kernel", "3x3"]) == 0
    out, err = capsys.readouterr()
    rows = cells(out)
    assert ["haar", "1", "9", "7", "no", "no"] in rows
    assert ["uhaar", "2", "9", "0", "no", "yes"] in rows
    assert ["klt", "1", "9", "0", "no", "yes"] in rows
    assert ["identity", "0", "9", "0", "no", "yes"] in rows
    assert "bior4.4" not in out
    assert "102 bases reach level 0 on 3x3: no transform runs; --all shows them" in out
    assert err == ""
    assert main(["bases", "--kernel", "3", "--all"]) == 0
    out, _ = capsys.readouterr()
    assert "bior4.4" in out
    assert "--all shows them" not in out


@pytest.mark.parametrize(
    ("line", "settings", "names"),
    [
        ("--kernel 8x6 --mode symmetric", ((8, 6), "symmetric"), ["haar", "db2", "uhaar"]),
        ("--kernel 3 --level 1", ((3, 3), "periodization", 1), ["haar", "uhaar", "dct"]),
        (
            "--kernel 3x5 --level 2 --force-level",
            ((3, 5), "periodization", 2, True),
            ["haar", "bior4.4", "dct"],
        ),
    ],
)
def test_bases_as_json_is_what_named_basis_builds(
    line: str, settings: tuple[Any, ...], names: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    content = json_of(capsys, "bases", *line.split())
    assert isinstance(content["bases"], list)
    rows = {row["basis"]: row for row in content["bases"]}
    for name in names:
        basis = named_basis(name, *settings)
        assert rows[name] == {
            "basis": name,
            "level": basis.level_used,
            "coefficients": basis.coefficients,
            "structural_zeros": int(basis.structural.sum()),
            "expansive": basis.expansive,
            "orthonormal": basis.orthonormal,
        }
    assert isinstance(content["level_0"], list)
    assert ("bior4.4" in content["level_0"]) != ("bior4.4" in rows)


def test_on_a_single_value_every_basis_is_the_identity(capsys: pytest.CaptureFixture[str]) -> None:
    content = json_of(capsys, "bases", "--kernel", "1", "--level", "2", "--force-level")
    assert isinstance(content["bases"], list)
    assert [row["basis"] for row in content["bases"]] == ["identity"]
