"""Coders: whole numbers to bytes and back. One file each, registered in ``CODERS``."""

from __future__ import annotations

from importlib import import_module

from .protocol import CODERS, Coded, Coder, SymbolEncoder, Symbols

# They register themselves; in this order, messages list them.
for _module in ("zstd", "ans"):
    import_module(f".{_module}", __name__)

__all__ = ["CODERS", "Coded", "Coder", "SymbolEncoder", "Symbols"]
