"""Benchmarks; start them from the top of the repository: ``python -m benchmarks.linear_cross_entropy``."""
