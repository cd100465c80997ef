"""A Hugging Face callback that keeps a network pruned; see ``wavprune.training.transformers``."""

from ..training.transformers import PruningCallback

__all__ = ["PruningCallback"]
