"""Benchmarks of the hot paths: ``python -m benchmarks run``, ``verify`` and ``profile``."""
