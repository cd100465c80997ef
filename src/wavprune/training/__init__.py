"""Networks that stay pruned while they are trained."""
