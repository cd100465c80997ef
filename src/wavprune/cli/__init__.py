"""The command line, one file a group of commands."""

from .app import main

__all__ = ["main"]
