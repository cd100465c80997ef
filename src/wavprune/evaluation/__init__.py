"""Evaluation of pruned models: metrics, batch-norm repair, file size, trials and comparisons."""
