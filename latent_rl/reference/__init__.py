"""The truth: each op in the shortest obviously correct PyTorch, sharing nothing with a kernel."""
