"""Evaluation: who answers, intervals, diversity, use of the codebook, and whether codes matter."""

from latent_rl.eval.answerers import FixedAnswers, LatentAnswerer, TokenAnswerer
from latent_rl.eval.answering import Answer, Answerer, Row, Sampling, answer_seeds
from latent_rl.eval.codes import CodeUsage, code_usage
from latent_rl.eval.diversity import distinct_n, distinct_responses
from latent_rl.eval.intervals import Interval, bootstrap_interval, t_interval
from latent_rl.eval.world_model import WorldModelReport, world_model_report

__all__ = [
    "Answer",
    "Answerer",
    "CodeUsage",
    "FixedAnswers",
    "Interval",
    "LatentAnswerer",
    "Row",
    "Sampling",
    "TokenAnswerer",
    "WorldModelReport",
    "answer_seeds",
    "bootstrap_interval",
    "code_usage",
    "distinct_n",
    "distinct_responses",
    "t_interval",
    "world_model_report",
]
