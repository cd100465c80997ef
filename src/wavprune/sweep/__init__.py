"""Sweeps: a grid of settings, run in parallel into one results file, exported and pictured."""
