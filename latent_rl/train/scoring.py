"""Score a rollout: what later updates compare with, and the terms of their loss.

The KL to the reference runs from the policy to it, KL(pi || pi_ref) = sum_k pi_k log(pi_k /
pi_ref_k): the direction that keeps the policy out of where the reference puts no mass, and the
one TRL's estimators estimate.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

from latent_rl import ops
from latent_rl.train.losses import PolicyTerms, ValueTerms
from latent_rl.train.replay import (
    ActionOutputs,
    Replay,
    ReplayBatch,
    action_logits,
    action_outputs,
    micro_batches,
)
from latent_rl.train.sampling import SampledDistribution

if TYPE_CHECKING:
    from latent_rl.nn import LatentPolicy

__all__ = ["RolloutScores", "ScoredTerms", "Scorer", "score_update"]


class RolloutScores(NamedTuple):
    """Of a whole rollout, under the policy that made it.

    logprobs    [B, T] of the taken codes under the distribution they were drawn from, or None
    support     [B, T, K] bool, codes that could be drawn, or None without truncation or logprobs
    ref_logits  [B, T, K] of the reference, or None without one
    log_ratio   [B, T] log(pi / pi_ref) of the taken codes, both tempered and truncated as sampled,
                or None without logprobs or reference
    values      [B, T] of the value head, or None without one
    """

    logprobs: Tensor | None
    support: Tensor | None
    ref_logits: Tensor | None
    log_ratio: Tensor | None
    values: Tensor | None


@dataclass(frozen=True)
class Scorer:
    """Runs policy, reference and value head over a rollout, a micro-batch at a time.

    batch_size       rows at a time
    autocast         context of the forward passes
    needs_logprobs   whether to run the policy at all: updates compare with it or rewards hold
                     its KL
    needs_reference  whether to run the reference on the whole rollout: rows are used more than
                     once, or rewards hold its KL
    """

    policy: LatentPolicy
    reference: LatentPolicy | None
    value_head: nn.Module | None
    distribution: SampledDistribution
    batch_size: int
    autocast: Callable[[], AbstractContextManager[None]]
    needs_logprobs: bool
    needs_reference: bool

    @torch.no_grad()
    def __call__(self, replay: Replay) -> RolloutScores:
        """Return the scores of every row; zero where no step is kept."""
        tables: dict[str, Tensor] = {}
        if not (self.needs_logprobs or self.needs_reference or self.value_head is not None):
            return RolloutScores(None, None, None, None, None)
        parts = [0] * -(-len(replay) // self.batch_size)
        batches = micro_batches(
            replay.kept_counts(), replay.states.group_size, self.batch_size, parts, 0
        )
        for rows, following in zip(batches, [*batches[1:], []], strict=True):
            batch = replay.batch(rows)
            if following:
                replay.prefetch(following)
            index, steps = torch.tensor(rows, device=replay.codes.device), batch.codes.shape[1]
            for name, found in self._part(batch)._asdict().items():
                if found is not None:
                    shape = (*replay.codes.shape, *found.shape[2:])
                    table = tables.setdefault(name, found.new_zeros(shape))
                    table[index, :steps] = found
        return RolloutScores(**{name: tables.get(name) for name in RolloutScores._fields})

    @torch.no_grad()
    def when_used(self, batch: ReplayBatch) -> ReplayBatch:
        """Return a micro-batch with the reference's logits, unless it has them or needs none.

        Rows that are used once are scored then: nothing of size T x K waits for them, and their
        states are fetched once.
        """
        if self.reference is None or batch.ref_logits is not None:
            return batch
        with self.autocast():
            return dataclasses.replace(batch, ref_logits=action_logits(self.reference, batch))

    def _part(self, part: ReplayBatch) -> RolloutScores:
        logprobs = support = ref_logits = log_ratio = values = None
        with self.autocast():
            if self.reference is not None and self.needs_reference:
                ref_logits = action_logits(self.reference, part)
            if self.needs_logprobs or self.value_head is not None:
                logits, values = action_outputs(self.policy, part, self.value_head)
                support = self.distribution.support(logits, part.codes)
                logprobs = self._logprob(logits, support, part.codes)
                if ref_logits is not None:
                    log_ratio = logprobs - self._logprob(ref_logits, support, part.codes)
        for scores in (logprobs, log_ratio):
            if scores is not None:
                # Steps without a code are no number.
                scores.masked_fill_(~part.keep_mask, 0.0)
        return RolloutScores(logprobs, support, ref_logits, log_ratio, values)

    def _logprob(self, logits: Tensor, support: Tensor | None, codes: Tensor) -> Tensor:
        scaled = self.distribution.scaled_logits(logits, support)
        return ops.code_logprobs(scaled, codes).logprob


class ScoredTerms(NamedTuple):
    """Terms of the loss and entropy [B, T] of the distribution sampled from (with gradient)."""

    terms: PolicyTerms
    entropy: Tensor


def score_update(
    outputs: ActionOutputs, replay: ReplayBatch, distribution: SampledDistribution
) -> ScoredTerms:
    """Return the loss's terms for the policy's outputs on a share of the replay.

    Codes are scored under what they were drawn from: tempered, and within the support frozen with
    the rollout. The KL is between the whole untempered policies: what truncation hides must not
    drift either. Without old log-probabilities the policy is still the one that sampled.
    """
    logits, values = outputs
    support = replay.support
    if replay.old_logprobs is None:
        support = distribution.support(logits, replay.codes)
    scored = ops.code_logprobs(distribution.scaled_logits(logits, support), replay.codes)
    kl = None
    if replay.ref_logits is not None:
        kl = ops.code_logprobs(logits, replay.codes, replay.ref_logits).kl
    old = scored.logprob.detach() if replay.old_logprobs is None else replay.old_logprobs
    value = None
    if values is not None and replay.old_values is not None and replay.returns is not None:
        value = ValueTerms(values, replay.old_values, replay.returns)
    terms = PolicyTerms(scored.logprob, old, replay.advantages, replay.keep_mask, kl, value)
    return ScoredTerms(terms, scored.entropy)
