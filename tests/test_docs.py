"""Every Python block and ``wavprune`` command of the README and the docs runs as it stands."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from wavprune.cli import main

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
BLOCK = re.compile(r"^```(python|console)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
# Those are run by `make docs`; these are written by scripts.
WITH_BLOCKS = [
    page
    for page in PAGES
    if BLOCK.search(page.read_text()) and not {"tutorials", "_build"} & set(page.parts)
]


def test_there_are_pages_to_run() -> None:
    assert {"README.md", "quickstart.md", "migration.md", "prune.md"} <= {
        page.name for page in WITH_BLOCKS
    }


@pytest.mark.parametrize("page", WITH_BLOCKS, ids=lambda page: page.stem)
def test_the_blocks_of_a_page_run_in_order(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {"__name__": page.stem}
    text = page.read_text()
    for block in BLOCK.finditer(text):
        line = text[: block.start()].count("\n") + 1
        # Errors name the line of the page.
        source = "\n" * line + block[2]
        if block[1] == "python":
            exec(compile(source, page, "exec"), names)
            continue
        for command in block[2].splitlines():
            if command.startswith("wavprune "):
                assert main(shlex.split(command, comments=True)[1:]) == 0, command


LINK = re.compile(r"\]\((?!https?://|#)([^)#\s]+)")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_lead_to_files(page: Path) -> None:
    if "_build" in page.parts:
        pytest.skip("built")
    for target in LINK.findall(page.read_text()):
        assert (page.parent / target).exists(), target
