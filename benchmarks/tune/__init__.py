"""Sweeps over the tiles of the Triton kernels that choose theirs from a table."""
