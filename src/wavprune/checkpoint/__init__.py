"""Compressed checkpoints: what is kept of each layer, quantized and entropy-coded.

A compressed file is a valid safetensors file. Its weights decode to the same bits on every machine
and backend: those that ``save`` has reported.
"""

from ..pruned import pruned_metadata
from .attached import Attached, attach
from .contents import CodedLayer, FileContents, contents_of
from .loading import decompress, load
from .portable_file import portable
from .report import SavedLayer, SaveReport
from .saving import save

__all__ = [
    "Attached",
    "CodedLayer",
    "FileContents",
    "SaveReport",
    "SavedLayer",
    "attach",
    "contents_of",
    "decompress",
    "load",
    "portable",
    "pruned_metadata",
    "save",
]
