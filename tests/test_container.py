"""The Dockerfile against what is there; no engine is needed."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from wavprune.cli.serve import serve

ROOT = Path(__file__).parent.parent
DOCKERFILE = ROOT / "Dockerfile"

pytestmark = pytest.mark.skipif(not DOCKERFILE.exists(), reason="a source archive has none")


@pytest.fixture(scope="module")
def steps() -> list[tuple[str, str]]:
    """The instructions and their arguments."""
    text = re.sub(r"\\\n", "", re.sub(r"^#.*\n", "", DOCKERFILE.read_text(), flags=re.MULTILINE))
    pairs = (line.split(maxsplit=1) for line in text.splitlines() if line.strip())
    return [(name, rest) for name, rest in pairs]


def test_what_is_copied_is_there_and_not_left_out(steps: list[tuple[str, str]]) -> None:
    let_through = (ROOT / ".dockerignore").read_text().split()
    copied = [rest.split()[:-1] for name, rest in steps if name == "COPY" and "--from" not in rest]
    assert sum(map(len, copied)) >= 8
    for source in (name for names in copied for name in names):
        assert (ROOT / source).exists()
        assert f"!{source}" in let_through


def test_what_is_installed_has_its_extras(steps: list[tuple[str, str]]) -> None:
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    (extras,) = re.findall(r"\$wheel\[([\w,]+)\]", " ".join(rest for _, rest in steps))
    assert set(extras.split(",")) <= project["optional-dependencies"].keys()


def test_what_it_starts_is_a_command_and_asked_for_where_it_listens(
    steps: list[tuple[str, str]],
) -> None:
    found = dict(steps)
    command = json.loads(found["CMD"])
    assert command[:2] == ["wavprune", "serve"]
    context = serve.make_context("serve", command[2:])
    assert context.params["host"] == "0.0.0.0"
    assert f"http://127.0.0.1:{context.params['port']}/" in found["HEALTHCHECK"]
    assert found["EXPOSE"] == str(context.params["port"])
    assert str(context.params["directory"]) == found["VOLUME"]
    compile(json.loads(found["HEALTHCHECK"].removeprefix("CMD "))[2], "health", "exec")
