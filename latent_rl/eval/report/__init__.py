"""HTML reports that stand alone: one per run, and runs side by side."""

from latent_rl.eval.report.history import read_histories
from latent_rl.eval.report.pages import environment, write_comparison, write_run_report

__all__ = ["environment", "read_histories", "write_comparison", "write_run_report"]
