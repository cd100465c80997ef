from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from wavprune.cli import main


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_each_shell_has_a_script(shell: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["completion", shell]) == 0
    script = capsys.readouterr().out
    assert "_WAVPRUNE_COMPLETE" in script
    assert f"{shell}_complete" in script


def test_another_shell_is_a_mistake(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["completion", "csh"]) == 2
    assert "'csh' is not one of 'bash', 'zsh', 'fish'" in capsys.readouterr().err


def test_bash_completes_commands_and_options(tmp_path: Path) -> None:
    program = tmp_path / "wavprune"
    program.write_text(f'#!/bin/sh\nexec {sys.executable} -m wavprune "$@"\n')
    program.chmod(0o755)
    script = f"""
        eval "$({program} completion bash)"
        COMP_WORDS=(wavprune co); COMP_CWORD=1
        _wavprune_completion {program}; echo "${{COMPREPLY[@]}}"
        COMP_WORDS=(wavprune prune --sp); COMP_CWORD=2; COMPREPLY=()
        _wavprune_completion {program}; echo "${{COMPREPLY[@]}}"
    """
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["compare", "compress", "completion", "--sparsity"]
