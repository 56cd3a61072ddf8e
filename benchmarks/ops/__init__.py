"""One module per op, each with an ``ENTRY``."""
