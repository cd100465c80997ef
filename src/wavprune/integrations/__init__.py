"""Training loops of other libraries that keep a network pruned: each a little over ``Pruner``."""
