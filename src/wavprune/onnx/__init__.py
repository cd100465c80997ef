"""ONNX models: exported, run as torch modules, stored in few bytes and run from there.

``wavprune.fast.prune`` prunes an ``onnx.ModelProto``, and ``wavprune prune`` an ``.onnx`` file,
without anything from here.
"""

from .exporting import export
from .models import to_torch, update
from .sessions import SessionModule, session
from .stored import decompress, save

__all__ = [
    "SessionModule",
    "decompress",
    "export",
    "save",
    "session",
    "to_torch",
    "update",
]
