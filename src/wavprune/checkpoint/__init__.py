"""Compressed checkpoints: what is kept of each layer, quantized and entropy-coded.

A compressed file is a valid safetensors file. Its weights decode to the same bits on every machine
and backend: those that ``save`` has reported.
"""

from .attached import Attached, attach
from .loading import decompress, load
from .portable_file import portable
from .report import SavedLayer, SaveReport
from .saving import save

__all__ = [
    "Attached",
    "SaveReport",
    "SavedLayer",
    "attach",
    "decompress",
    "load",
    "portable",
    "save",
]
