"""Decoding, RL and the stages at the shapes of a real model."""
