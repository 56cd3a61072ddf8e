"""Benchmarks of whole parts of training: more than one op."""
