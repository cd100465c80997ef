"""A Lightning callback that keeps a network pruned; see ``wavprune.training.lightning``."""

from ..training.lightning import PruningCallback

__all__ = ["PruningCallback"]
