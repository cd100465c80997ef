"""The command line: the group of all commands, and how errors end it."""

from __future__ import annotations

import importlib
import os
import shutil
import signal
import sys
import traceback
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TextIO

import click
from click.shell_completion import CompletionItem

from .._version import __version__
from ..common.optional import MissingExtraError
from ..errors import WavpruneError
from .output import Outputs, printable, write
from .process import (
    Terminated,
    abandon,
    raise_if_interrupted,
    standard_streams,
    termination,
)
from .sweep import FailedRunsError

# Each command: its file, which imports torch, and its line in ``wavprune --help``, which does not.
COMMANDS = {
    "prune": ("prune", "Prune the weights of a checkpoint."),
    "inspect": ("inspect", "Show the layers of a checkpoint, and the levels of each wavelet."),
    "bases": ("bases", "Show the bases of a kernel size: levels and coefficients."),
    "info": ("info", "Show versions, the instruction set, and which backends run here."),
    "compare": ("compare", "Compare methods and bases on a network, by what it answers."),
    "sweep": ("sweep", "Run the grid of a sweep file, in parallel, into a results file."),
    "export": ("sweep", "Write the runs of a results file as a table, or for TensorBoard."),
    "report": ("sweep", "Write a results file as one page: bytes, pictures and tables."),
    "compress": ("checkpoint", "Store the weights of a checkpoint in few bytes."),
    "decompress": ("checkpoint", "Write what compress stored as an ordinary safetensors file."),
    "portable": ("checkpoint", "Write a packed file so that it is read without Zstandard."),
    "serve": ("serve", "Prune models over HTTP, with a page in front of it."),
    "completion": ("completion", "Print a script that completes commands in a shell."),
}
DONE, DEFECT, FAILED_RUNS, MISTAKE, INTERRUPTED = 0, 1, 1, 2, 130
REPORT_DEFECT = (
    "this is a defect of wavprune, not of what you gave it; please report it with the lines above"
)

# What torch's allocator says, and what the compiled operators say of it.
FAILED_ALLOCATIONS = ("can't allocate memory", '"aten::new_empty"', '"aten::empty"')


def main(args: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        args: what follows ``wavprune``; None takes it from ``sys.argv``.

    Returns:
        The exit status: 0; 1 after a defect of wavprune, with its traceback, and where runs of a
        sweep failed, which are named; 2 after a mistake of
        the user or an error of the operating system, which one line on standard error names; 130
        after Ctrl-C and 128 plus the number of the signal after SIGTERM and SIGHUP. Where files
        were written before the error, that line says which.
    """
    outputs = Outputs()
    with standard_streams(), _warnings_in_one_line():
        try:
            with termination():
                status = wavprune.main(
                    args, prog_name="wavprune", standalone_mode=False, obj=outputs
                )
                # A failure would otherwise go unnoticed until the process ends.
                write("")
        except (Exception, KeyboardInterrupt) as error:
            return _end(error, outputs)
    return status if isinstance(status, int) else DONE


class _CarriedError(Exception):
    """Carries an error past ``click.Command.main``, which would end the process at it."""

    def __init__(self, error: BaseException) -> None:
        super().__init__(error)
        self.error = error


@contextmanager
def _past_click() -> Iterator[None]:
    try:
        yield
    except (OSError, EOFError, KeyboardInterrupt) as error:
        raise _CarriedError(error) from error


class _Group(click.Group):
    """Commands that are imported when they are asked for."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        module = importlib.import_module(f".{COMMANDS[cmd_name][0]}", __package__)
        raise_if_interrupted()
        command: click.Command = getattr(module, cmd_name)
        return command

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[CompletionItem]:
        names = [CompletionItem(name, help=line) for name, (_, line) in COMMANDS.items()]
        options = click.Command.shell_complete(self, ctx, incomplete)
        return [item for item in names if item.value.startswith(incomplete)] + options

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, line) for name, (_, line) in COMMANDS.items()])

    def make_context(self, *args: Any, **extra: Any) -> click.Context:
        with _past_click():
            return super().make_context(*args, **extra)

    def invoke(self, ctx: click.Context) -> Any:
        with _past_click():
            return super().invoke(ctx)


@click.group(
    cls=_Group,
    invoke_without_command=True,
    context_settings={"help_option_names": ["-h", "--help"], "show_default": True},
)
@click.version_option(__version__, prog_name="wavprune")
@click.pass_context
def wavprune(context: click.Context) -> None:
    """Prune convolutional networks in a wavelet basis."""
    if context.invoked_subcommand is None:
        click.echo(context.get_help())


def _end(error: BaseException, outputs: Outputs) -> int:
    """Say what went wrong and what was done before; return the exit status."""
    if isinstance(error, _CarriedError):
        error = error.error
    message, status = _verdict(error)
    written = [str(path) for path in outputs.written()]
    if written:
        message += f"; written before that: {', '.join(written)}"
    if status == DEFECT:
        _complain("".join(traceback.format_exception(error)).rstrip("\n"))
    _complain(f"wavprune: error: {_one_line(message)}")
    try:
        sys.stdout.flush()
    except OSError:
        abandon(sys.stdout)
    return status


def _verdict(error: BaseException) -> tuple[str, int]:
    """The line that an error becomes, and the exit status."""
    if isinstance(error, Terminated):
        return f"ended by {signal.Signals(error.signum).name}", 128 + error.signum
    if isinstance(error, (KeyboardInterrupt, click.Abort)):
        return "interrupted", INTERRUPTED
    if isinstance(error, FailedRunsError):
        return error.format_message(), FAILED_RUNS
    if isinstance(error, click.ClickException):
        return error.format_message(), MISTAKE
    if isinstance(error, (WavpruneError, MissingExtraError)):
        return str(error), MISTAKE
    if isinstance(error, OSError):
        return _os_error_message(error), MISTAKE
    if isinstance(error, MemoryError):
        return f"not enough memory: {error}".removesuffix(": "), MISTAKE
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(error, torch.OutOfMemoryError):
        return f"not enough memory: {error}", MISTAKE
    if isinstance(error, RuntimeError) and any(words in str(error) for words in FAILED_ALLOCATIONS):
        return "not enough memory", MISTAKE
    return REPORT_DEFECT, DEFECT


def _os_error_message(error: OSError) -> str:
    if isinstance(error, shutil.Error) and error.args and isinstance(error.args[0], list):
        # All files that copytree could not copy; the first says enough.
        source, _, reason = error.args[0][0]
        return f"{source}: {reason}"
    reason = error.strerror or str(error) or type(error).__name__
    if error.filename is None:
        return reason
    # The new name of a renamed file, which is the one that the user knows, comes second.
    path = error.filename if error.filename2 is None else error.filename2
    return f"{os.fsdecode(path) if isinstance(path, bytes) else path}: {reason}"


def _complain(text: str) -> None:
    """Write lines to standard error; where that fails too, nobody is left to tell."""
    try:
        sys.stderr.write(f"{text}\n")
        sys.stderr.flush()
    except OSError:
        abandon(sys.stderr)


@contextmanager
def _warnings_in_one_line() -> Iterator[None]:
    def show(
        message: Warning | str,
        category: type[Warning],
        filename: str,
        lineno: int,
        file: TextIO | None = None,
        line: str | None = None,
    ) -> None:
        _complain(f"wavprune: warning: {_one_line(str(message))}")

    with warnings.catch_warnings():
        warnings.simplefilter("default", UserWarning)
        warnings.showwarning = show
        yield


def _one_line(text: str) -> str:
    return printable(" ".join(text.split()))
