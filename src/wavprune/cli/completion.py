"""``wavprune completion``."""

from __future__ import annotations

import click
from click.shell_completion import get_completion_class

from .output import write

# What click looks for in the environment of a program of this name.
VARIABLE = "_WAVPRUNE_COMPLETE"
SHELLS = ("bash", "zsh", "fish")


@click.command()
@click.argument("shell", metavar="SHELL", type=click.Choice(SHELLS))
def completion(shell: str) -> None:
    """Print a script that completes commands and options with the tab key.

    SHELL is bash, zsh or fish. `eval "$(wavprune completion bash)"` in ~/.bashrc turns it on, in
    zsh likewise; in fish, write it to ~/.config/fish/completions/wavprune.fish.
    """
    kind = get_completion_class(shell)
    assert kind is not None
    group = click.get_current_context().find_root().command
    write(kind(group, {}, "wavprune", VARIABLE).source() + "\n")
