"""Pruning from calibration data: what is kept, and its values, follow from a few inputs."""
