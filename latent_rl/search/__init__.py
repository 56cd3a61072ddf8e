"""Search at test time: best of n, self-consistency and tree search over latent actions."""

from latent_rl.search.candidates import AnswererSource, Candidate, CandidateSource, CodeSource
from latent_rl.search.choosers import BestScore, Chooser, CodeMedoid, Majority, softmax_weights
from latent_rl.search.code_tree import SearchBudget, TreeSearch, TreeSearchSettings
from latent_rl.search.estimators import best_at_k, pass_at_k
from latent_rl.search.names import SEARCHES, SearchContext, parse_search, search_by_name
from latent_rl.search.proposals import CodeCritic, CriticPruned, PolicyTopK, Proposer, StateValue
from latent_rl.search.sampled import SampledSearch
from latent_rl.search.scorers import CallableScore, MeanLogprob, RewardScore, Scorer
from latent_rl.search.tree import Evaluation, Node, Tree, TreeSettings, puct
from latent_rl.search.voting import (
    edit_distance,
    last_number,
    medoid,
    normalised,
    weighted_majority,
)

__all__ = [
    "SEARCHES",
    "AnswererSource",
    "BestScore",
    "CallableScore",
    "Candidate",
    "CandidateSource",
    "Chooser",
    "CodeCritic",
    "CodeMedoid",
    "CodeSource",
    "CriticPruned",
    "Evaluation",
    "Majority",
    "MeanLogprob",
    "Node",
    "PolicyTopK",
    "Proposer",
    "RewardScore",
    "SampledSearch",
    "Scorer",
    "SearchBudget",
    "SearchContext",
    "StateValue",
    "Tree",
    "TreeSearch",
    "TreeSearchSettings",
    "TreeSettings",
    "best_at_k",
    "edit_distance",
    "last_number",
    "medoid",
    "normalised",
    "parse_search",
    "pass_at_k",
    "puct",
    "search_by_name",
    "softmax_weights",
    "weighted_majority",
]
