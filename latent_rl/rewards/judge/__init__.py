"""A language model as judge, over any OpenAI-compatible endpoint."""

from latent_rl.rewards.judge.budget import Budget
from latent_rl.rewards.judge.errors import JudgeError
from latent_rl.rewards.judge.rewards import JudgeCase, Judgement, PairwiseJudge, PointwiseJudge
from latent_rl.rewards.judge.rubrics import MMROLE, PCOGALIGN, RUBRICS, Dimension, Rubric
from latent_rl.rewards.judge.settings import JudgeSettings

__all__ = [
    "MMROLE",
    "PCOGALIGN",
    "RUBRICS",
    "Budget",
    "Dimension",
    "JudgeCase",
    "JudgeError",
    "JudgeSettings",
    "Judgement",
    "PairwiseJudge",
    "PointwiseJudge",
    "Rubric",
]
