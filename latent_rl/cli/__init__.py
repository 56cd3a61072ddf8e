"""The command line, `latent-rl`."""

from latent_rl.cli.app import app, main, run

__all__ = ["app", "main", "run"]
