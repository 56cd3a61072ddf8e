"""Quantizers: from the inverse model's features to codes and code vectors."""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from latent_rl import ops
from latent_rl.nn.codebook import Codebook
from latent_rl.nn.regularizers import orthogonality_loss, usage_loss


class Quantized(NamedTuple):
    """What a quantizer returns for N rows.

    Attributes:
        codes: int64 [N]; -1 for a non-finite row.
        vectors: [N, D] float32; the value is ``codebook[codes]``, the gradient goes straight
            through to the features (and, Gumbel, to the codebook).
        loss: scalar the stage adds as it is; weights are already in it.
        mean_probs: [K] share of each code: of the rows' distributions (Gumbel, differentiable)
            or of the chosen codes (vector quantizer). Sums to 1 over valid rows.
        entropy: [N] nats of each row's distribution; zeros for the vector quantizer.
        perplexity: scalar, exp of the entropy of the chosen codes; no gradient.
    """

    codes: Tensor
    vectors: Tensor
    loss: Tensor
    mean_probs: Tensor
    entropy: Tensor
    perplexity: Tensor


class Quantizer(Protocol):
    """What the model asks of a quantizer (an ``nn.Module``)."""

    codebook: Codebook

    @property
    def feature_dim(self) -> int:
        """F, the width of the features the inverse head must output."""
        ...

    def __call__(self, features: Tensor, seed: int | Tensor) -> Quantized:
        """Quantise rows [N, F] with seeded noise; learns when in training mode."""
        ...

    def codes(self, features: Tensor) -> Tensor:
        """Most likely code, without noise: [..., F] -> int64 [...]."""
        ...

    def scores(self, features: Tensor) -> Tensor:
        """Log-scores of all codes: [..., F] -> float32 [..., K]."""
        ...


def perplexity(counts: Tensor) -> Tensor:
    """exp(entropy) of counts [K]: 1 when one code is used, K when all are used evenly."""
    share = counts.float() / counts.sum().clamp_min(1)
    entropy: Tensor = torch.special.entr(share).sum()
    return entropy.exp()


class VectorQuantizer(nn.Module):
    """Nearest code (VQ-VAE): features live in the codebook's space, F = D.

    The loss is ``commitment * mean((x - sg(c))^2)``, plus ``mean((sg(x) - c)^2)`` when the
    codebook learns by gradient, plus the regularisers of :mod:`latent_rl.nn.regularizers` that
    have a weight.
    """

    codebook: Codebook

    def __init__(
        self,
        codebook: Codebook,
        *,
        commitment: float = 0.25,
        orthogonality: float = 0.0,
        usage: float = 0.0,
        usage_temperature: float = 1.0,
    ) -> None:
        """See the class.

        Args:
            codebook: learned by moving averages or by gradient.
            commitment: beta (van den Oord et al. 2017, eq. 3).
            orthogonality: weight of :func:`orthogonality_loss`; needs a codebook with gradients.
            usage: weight of :func:`usage_loss`, which moves rows towards neglected codes, and
                codes with gradients towards rows.
            usage_temperature: of its soft assignments.

        Raises:
            ValueError: for negative weights, or orthogonality of codes without gradients.
        """
        super().__init__()
        if min(commitment, orthogonality, usage) < 0:
            raise ValueError(
                "VectorQuantizer: commitment, orthogonality and usage must be >= 0, got "
                f"{commitment}, {orthogonality} and {usage}"
            )
        if orthogonality and not isinstance(codebook.weight, nn.Parameter):
            raise ValueError(
                "VectorQuantizer: orthogonality needs a codebook that learns by gradient, got "
                f"{type(codebook).__name__}"
            )
        self.orthogonality, self.usage = orthogonality, usage
        self.usage_temperature = usage_temperature
        self.codebook = codebook
        self.commitment = commitment

    @property
    def feature_dim(self) -> int:
        """D."""
        return self.codebook.dim

    def forward(self, features: Tensor, seed: int | Tensor) -> Quantized:
        """Quantise rows [N, D]; in training the codebook learns from exactly these rows.

        ``seed`` is not used: the nearest code is deterministic.
        """
        x = self._placed(features)
        if self.training:
            self.codebook.observe(x)
        # A copy: the moving-average update below changes the codes in place while autograd still
        # needs the values that were used.
        weight = self.codebook.weight.float()
        if not weight.requires_grad:
            weight = weight.clone()
        out = ops.quantize(x, weight, metric=self.codebook.metric)
        loss = self.commitment * out.commitment_loss
        if weight.requires_grad:
            loss = loss + out.codebook_loss
        if self.orthogonality:
            loss = loss + self.orthogonality * orthogonality_loss(weight)
        if self.usage:
            loss = loss + self.usage * usage_loss(x, weight, temperature=self.usage_temperature)
        if self.training:
            self.codebook.update(x, out.counts, out.sums)
        share = out.counts.float() / out.counts.sum().clamp_min(1)
        return Quantized(
            codes=out.codes,
            vectors=out.quantized,
            loss=loss,
            mean_probs=share,
            entropy=x.new_zeros(x.shape[0]),
            perplexity=out.perplexity.detach(),
        )

    def _placed(self, features: Tensor) -> Tensor:
        """Features where the codes live: on the unit sphere for the cosine metric."""
        x = features.float()
        return nn.functional.normalize(x, dim=-1) if self.codebook.metric == "cosine" else x

    def codes(self, features: Tensor) -> Tensor:
        """Nearest code: [..., D] -> int64 [...]."""
        return self.codebook.nearest(features.float())

    def scores(self, features: Tensor) -> Tensor:
        """log softmax of the negative squared distances (or cosines): [..., D] -> [..., K]."""
        x, weight = self._placed(features), self.codebook.weight.float()
        if self.codebook.metric == "cosine":
            score = x @ nn.functional.normalize(weight, dim=-1).T
        else:
            # |x|^2 is the same for all codes and drops out of the softmax.
            score = 2 * x @ weight.T - weight.square().sum(-1)
        return score.log_softmax(-1)


class GumbelQuantizer(nn.Module):
    """Gumbel straight-through (the paper's quantizer): features are code logits, F = K.

    The loss is ``-marginal_entropy * H(mean of softmax(logits))``: it keeps codes in use. (The
    paper's per-token entropy term is the stage's, see ``InverseWarmup``.)
    """

    codebook: Codebook

    def __init__(
        self, codebook: Codebook, *, tau: float = 2.0, marginal_entropy: float = 0.02
    ) -> None:
        """See the class; tau > 0 is the softmax temperature of the straight-through gradient.

        Raises:
            ValueError: for tau <= 0.
        """
        super().__init__()
        if tau <= 0:
            raise ValueError(f"GumbelQuantizer: tau must be > 0, got {tau}")
        self.codebook = codebook
        self.tau, self.marginal_entropy = tau, marginal_entropy

    @property
    def feature_dim(self) -> int:
        """K."""
        return self.codebook.num_codes

    def forward(self, features: Tensor, seed: int | Tensor) -> Quantized:
        """Sample a code per row of logits [N, K]; in eval mode the most likely code, no noise."""
        logits, weight = features.float(), self.codebook.weight.float()
        if not self.training:
            return self._mode(logits, weight)
        out = ops.gumbel_quantize(logits, weight, tau=self.tau, seed=seed, hard=True)
        marginal = torch.special.entr(out.mean_probs).sum()
        return Quantized(
            codes=out.codes,
            vectors=out.vectors,
            loss=-self.marginal_entropy * marginal,
            mean_probs=out.mean_probs,
            entropy=out.entropy,
            perplexity=perplexity(out.counts),
        )

    def _mode(self, logits: Tensor, weight: Tensor) -> Quantized:
        codes = self.codes(logits)
        probs = logits.softmax(-1)
        mean_probs = probs.mean(0) if probs.shape[0] else probs.new_zeros(probs.shape[-1])
        marginal = torch.special.entr(mean_probs).sum()
        return Quantized(
            codes=codes,
            vectors=weight[codes.clamp_min(0)],
            loss=-self.marginal_entropy * marginal,
            mean_probs=mean_probs,
            entropy=torch.special.entr(probs).sum(-1),
            perplexity=perplexity(torch.bincount(codes.clamp_min(0), minlength=weight.shape[0])),
        )

    def codes(self, features: Tensor) -> Tensor:
        """Argmax, lowest id on ties: [..., K] -> int64 [...]; -1 for a row with NaN."""
        flat = features.float().reshape(-1, features.shape[-1])
        picked = ops.sample_codes(flat, temperature=0.0, seed=0).codes
        return picked.reshape(features.shape[:-1])

    def scores(self, features: Tensor) -> Tensor:
        """log softmax of the logits: [..., K] -> float32 [..., K]."""
        return features.float().log_softmax(-1)
