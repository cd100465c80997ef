"""The command line: one file for each group of commands."""

from __future__ import annotations

import sys
from collections.abc import Sequence


def main(args: Sequence[str] | None = None) -> int:
    """Run the command line; see ``app.main``."""
    try:
        from .app import main as run
    except KeyboardInterrupt:
        # What it imports takes long enough to be interrupted.
        sys.stderr.write("wavprune: error: interrupted\n")
        return 130
    return run(args)


__all__ = ["main"]
