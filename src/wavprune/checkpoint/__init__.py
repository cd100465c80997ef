"""Compressed checkpoints: what is kept of each layer, quantized and entropy-coded.

A compressed file is a valid safetensors file. Its weights decode to the same bits on every machine
and backend: those that ``save`` has reported.
"""

from .attached import Attached, attach
from .contents import CodedLayer, FileContents, contents_of
from .loading import decompress, load
<<<<<<< HEAD
from .portable import portable
from .pruned import pruned_metadata
=======
from .portable_file import portable
>>>>>>> w-cdec
from .report import SavedLayer, SaveReport
from .saving import save

__all__ = [
    "Attached",
<<<<<<< HEAD
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
=======
    "SaveReport",
    "SavedLayer",
    "attach",
    "decompress",
    "load",
    "portable",
>>>>>>> w-cdec
    "save",
]
