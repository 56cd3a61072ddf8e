"""Evaluation: intervals, diversity, use of the codebook, and whether the codes matter."""

from latent_rl.eval.codes import CodeUsage, code_usage
from latent_rl.eval.diversity import distinct_n, distinct_responses
from latent_rl.eval.intervals import Interval, bootstrap_interval, t_interval
from latent_rl.eval.world_model import WorldModelReport, world_model_report

__all__ = [
    "CodeUsage",
    "Interval",
    "WorldModelReport",
    "bootstrap_interval",
    "code_usage",
    "distinct_n",
    "distinct_responses",
    "t_interval",
    "world_model_report",
]
