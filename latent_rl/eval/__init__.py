"""Evaluation: ask, score, record; rewards with intervals, diversity, and what the codes do."""

from latent_rl.eval.answerers import FixedAnswers, LatentAnswerer, TokenAnswerer
from latent_rl.eval.answering import Answer, Answerer, Row, Sampling, answer_seeds
from latent_rl.eval.code_tokens import CodeUse, code_uses
from latent_rl.eval.codes import CodeUsage, code_usage
from latent_rl.eval.compare import Comparison, compare
from latent_rl.eval.diversity import distinct_n, distinct_responses, self_bleu
from latent_rl.eval.embedding import BUNDLED_ENCODER, SentenceEncoder, load_encoder
from latent_rl.eval.harness import evaluate
from latent_rl.eval.intervals import (
    Interval,
    bootstrap_interval,
    clustered_interval,
    paired_interval,
    t_interval,
)
from latent_rl.eval.record import (
    Evaluation,
    EvaluationSettings,
    load_evaluation,
    save_evaluation,
)
from latent_rl.eval.semantic import (
    mean_pairwise_cosine,
    pairwise_similarities,
    semantic_diversity,
)
from latent_rl.eval.summary import SplitSummary, prompt_values, summarise
from latent_rl.eval.world_model import WorldModelReport, world_model_report

__all__ = [
    "BUNDLED_ENCODER",
    "Answer",
    "Answerer",
    "CodeUsage",
    "CodeUse",
    "Comparison",
    "Evaluation",
    "EvaluationSettings",
    "FixedAnswers",
    "Interval",
    "LatentAnswerer",
    "Row",
    "Sampling",
    "SentenceEncoder",
    "SplitSummary",
    "TokenAnswerer",
    "WorldModelReport",
    "answer_seeds",
    "bootstrap_interval",
    "clustered_interval",
    "code_usage",
    "code_uses",
    "compare",
    "distinct_n",
    "distinct_responses",
    "evaluate",
    "load_encoder",
    "load_evaluation",
    "mean_pairwise_cosine",
    "paired_interval",
    "pairwise_similarities",
    "prompt_values",
    "save_evaluation",
    "self_bleu",
    "semantic_diversity",
    "summarise",
    "t_interval",
    "world_model_report",
]
