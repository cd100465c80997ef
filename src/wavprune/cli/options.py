"""Options that several commands share."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from ..config import METHODS, MODES, PruneConfig

Command = TypeVar("Command", bound=Callable[..., Any])

DEFAULTS = PruneConfig()
METHOD_ALIASES = {"magnitude": "min-weight"}


class Method(click.Choice[str]):
    """The methods, with a hyphen or an underscore; ``magnitude`` means ``min-weight``."""

    def __init__(self) -> None:
        super().__init__([method.replace("_", "-") for method in METHODS])

    def normalize_choice(self, choice: object, ctx: click.Context | None) -> str:
        """The name of the setting; see ``click.Choice``."""
        name = str(choice).replace("_", "-")
        return METHOD_ALIASES.get(name, name)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """The name of the setting; see ``click.Choice``."""
        return super().convert(value, param, ctx).replace("-", "_")


SOURCE = click.argument("source", metavar="IN", type=click.Path(path_type=Path))
METHOD = click.option("--method", type=Method(), default="dwt", help="What to prune by.")
WAVELET = click.option(
    "--wavelet",
    metavar="NAME",
    default=DEFAULTS.wavelet,
    help="A discrete wavelet of PyWavelets, or uhaar, dct, klt, identity, auto.",
)
TARGETS = click.option(
    "--targets",
    metavar="PATTERN",
    multiple=True,
    help="Prune these layers: a name, a glob or re:...; can be repeated.  [default: every layer]",
)
IGNORE = click.option(
    "--ignore",
    metavar="PATTERN",
    multiple=True,
    help="Leave these layers out: a name, a glob or re:...; can be repeated.",
)
JSON = click.option("--json", "as_json", is_flag=True, help="Print JSON instead of tables.")


def transform_options(command: Command) -> Command:
    """Add ``--level``, ``--mode`` and ``--force-level``."""
    for option in (
        click.option(
            "--force-level",
            is_flag=True,
            help="Use --level even where PyWavelets calls it too deep for the kernel.",
        ),
        click.option(
            "--mode",
            metavar="NAME",
            type=click.Choice(MODES),
            default=DEFAULTS.mode,
            help=f"How PyWavelets extends a kernel past its border: {', '.join(MODES)}.",
        ),
        click.option(
            "--level",
            type=click.IntRange(min=1),
            help="Levels of the transform.  [default: the deepest that exists]",
        ),
    ):
        command = option(command)
    return command
