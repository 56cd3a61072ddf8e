"""The part of a run's settings that says what is optimised, and the objects it stands for."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, TypeVar

from latent_rl.train.advantages import RewardScale, reward_scale
from latent_rl.train.coefficients import CoefficientSchedule, coefficient_schedule
from latent_rl.train.estimators import AdvantageEstimator, AdvantageSettings
from latent_rl.train.kl_control import AdaptiveKL, FixedKL, KLController, ReferenceSync
from latent_rl.train.losses import (
    CHOICES,
    Algorithm,
    ClipRange,
    GammaWeights,
    LossSettings,
    SoftGate,
    algorithm,
    ratio_level,
)
from latent_rl.train.reward_shaping import RewardShaping

__all__ = ["AlgorithmSettings"]


@dataclass
class AlgorithmSettings:
    """What is optimised, under TRL's names (`GRPOConfig`, `RLOOConfig`, `PPOConfig`; PPOConfig's
    `kl_coef` and `cliprange` are `beta` and `epsilon` here).

    A setting that None leaves to the algorithm takes its default from `algorithm().defaults`. One
    that the chosen algorithm does not read (`losses.CHOICES`) may not be set.

    num_generations            G completions per prompt
    max_completion_length      T, tokens
    loss_type                  name of the algorithm, see `losses.ALGORITHMS`
    beta                       weight of the KL to the reference (paper: 0.01); 0 keeps no reference
    target_kl                  KL per kept code (nats) that beta is steered to; None keeps beta
    kl_horizon                 completions over which a wrong KL changes beta by its error
    kl_in_reward               whether the KL is taken off the reward, as log pi / pi_ref of the
                               taken codes, instead of being exact and in the loss; None takes the
                               algorithm's default (rloo, reinforce_plus_plus and ppo True)
    sync_ref_model             move the reference towards the policy every ref_model_sync_steps
                               optimizer steps, by ref_model_mixup_alpha; seen by the next rollout
    epsilon, epsilon_high      clip range; None takes the algorithm's default. cispo's epsilon_high
                               is the largest weight itself
    delta                      bound of the ratio where clipping leaves it alone (two-sided
                               clipping), above 1 + epsilon_high; None is no bound
    importance_sampling_level  "token" or "sequence", what a ratio belongs to
    scale_rewards              "group" (or True), "batch", "none" (or False)
    normalize_advantages       bring advantages to mean 0, standard deviation 1 over a rollout
    gamma, lam                 discount; lambda of GAE
    whiten_rewards             divide token rewards by their standard deviation (ppo)
    vf_coef, cliprange_value   weight of the value loss; how far a value may move (ppo)
    detach_value               whether the value loss stops at its head; False lets it move the
                               tower that policy and value share (ppo)
    sapo_*, vespo_*            constants of these losses
    entropy_coef               weight of the mean entropy per kept code, taken off the loss
    entropy_schedule           "constant", "linear" or "cosine", from entropy_coef at the start of
                               the run to entropy_coef_end at its end
    reward_clip_range          (lowest, highest) reward, or None
    soft_punish_cache          L_cache of DAPO's overlong punishment in tokens, or None for none
    soft_punish_weight         its largest value, in units of the reward
    missing_eos_penalty        taken off the reward of a completion without an end, or None
    dynamic_sampling           replace groups whose rewards are all equal by other prompts
    max_resample_rounds        rounds of replacement before the rest is used as it is
    """

    num_generations: int = 8
    max_completion_length: int = 256
    loss_type: str = "grpo"
    beta: float = 0.01
    target_kl: float | None = None
    kl_horizon: int = 10_000
    kl_in_reward: bool | None = None
    sync_ref_model: bool = False
    ref_model_mixup_alpha: float = 0.6
    ref_model_sync_steps: int = 512
    epsilon: float | None = None
    epsilon_high: float | None = None
    delta: float | None = None
    importance_sampling_level: str | None = None
    scale_rewards: str | None = None
    normalize_advantages: bool = False
    gamma: float = 1.0
    lam: float = 0.95
    whiten_rewards: bool = False
    vf_coef: float = 0.1
    cliprange_value: float = 0.2
    detach_value: bool = True
    sapo_temperature_neg: float = 1.05
    sapo_temperature_pos: float = 1.0
    vespo_k_pos: float = 2.0
    vespo_lambda_pos: float = 3.0
    vespo_k_neg: float = 3.0
    vespo_lambda_neg: float = 2.0
    entropy_coef: float = 0.0
    entropy_schedule: str = "constant"
    entropy_coef_end: float = 0.0
    reward_clip_range: list[float] | None = None
    soft_punish_cache: int | None = None
    soft_punish_weight: float = 1.0
    missing_eos_penalty: float | None = None
    dynamic_sampling: bool | None = None
    max_resample_rounds: int = 3

    def check_algorithm(self) -> None:
        """Build what the names stand for once, so that a wrong one fails here and not in a rollout.

        Raises:
            ValueError: an unknown name, a value out of range, or a setting the algorithm ignores.
        """
        chosen = self.algorithm()
        if self.beta < 0:
            raise ValueError(f"LatentGRPOConfig: beta must be >= 0, got {self.beta}")
        self._check_groups(chosen)
        self._check_choices(chosen)
        self.loss_settings(self.beta)
        self.estimator()
        self.reward_shaping()
        self.kl_controller()
        self.reference_sync()
        self.entropy_coefficient()

    def _check_groups(self, chosen: Algorithm) -> None:
        fewest = 2 if self.resample_rounds() else chosen.min_generations
        if self.num_generations < fewest:
            reason = "an advantage is relative to a group" if fewest > 1 else "nothing to learn of"
            raise ValueError(
                f"LatentGRPOConfig: num_generations must be >= {fewest} ({reason}), "
                f"got {self.num_generations}"
            )

    def _check_choices(self, chosen: Algorithm) -> None:
        for field in fields(AlgorithmSettings):
            value = getattr(self, field.name)
            if field.name in CHOICES - chosen.choices and value != field.default:
                raise ValueError(
                    f"LatentGRPOConfig: {field.name} means nothing to loss_type "
                    f"{chosen.name!r}, got {value!r}"
                )

    def algorithm(self) -> Algorithm:
        """The algorithm `loss_type` names."""
        return algorithm(self.loss_type)

    def loss_settings(self, beta: float) -> LossSettings:
        """The loss's settings with the algorithm's defaults filled in; beta is the current one."""
        level = _chosen(
            self.importance_sampling_level, self.algorithm().defaults.importance_sampling_level
        )
        return LossSettings(
            clip=self.clip_range(),
            beta=0.0 if self.puts_kl_in_reward() else beta,
            ratio=ratio_level(level),
            vf_coef=self.vf_coef,
            cliprange_value=self.cliprange_value,
            soft_gate=SoftGate(self.sapo_temperature_pos, self.sapo_temperature_neg),
            gamma_weights=GammaWeights(
                self.vespo_k_pos, self.vespo_lambda_pos, self.vespo_k_neg, self.vespo_lambda_neg
            ),
        )

    def clip_range(self) -> ClipRange:
        """The clip range with the algorithm's defaults filled in."""
        defaults = self.algorithm().defaults
        low = _chosen(self.epsilon, defaults.epsilon)
        high = _chosen(self.epsilon_high, _chosen(defaults.epsilon_high, low))
        return ClipRange(low, high, self.delta)

    def reward_scale(self) -> RewardScale:
        """The advantage scale with the algorithm's default filled in."""
        # As in TRL the annotation has no bool, which command line parsers cannot take beside str.
        given: Any = self.scale_rewards
        if isinstance(given, bool):
            given = "group" if given else "none"
        return reward_scale(_chosen(given, self.algorithm().defaults.scale_rewards))

    def estimator(self) -> AdvantageEstimator:
        """What makes advantages of a rollout."""
        return self.algorithm().estimator(
            AdvantageSettings(
                scale=self.reward_scale(),
                normalize_advantages=self.normalize_advantages,
                gamma=self.gamma,
                lam=self.lam,
                whiten_rewards=self.whiten_rewards,
            )
        )

    def reward_shaping(self) -> RewardShaping:
        """What happens to rewards before."""
        return RewardShaping(
            max_completion_length=self.max_completion_length,
            clip=self.reward_clip_range,
            soft_punish_cache=self.soft_punish_cache,
            soft_punish_weight=self.soft_punish_weight,
            missing_eos_penalty=self.missing_eos_penalty,
        )

    def puts_kl_in_reward(self) -> bool:
        """Whether the KL penalty is part of the reward instead of the loss."""
        wanted = _chosen(self.kl_in_reward, self.algorithm().defaults.kl_in_reward)
        return bool(self.beta) and wanted

    def kl_controller(self) -> KLController:
        """What chooses beta: a new controller at its first value."""
        if self.target_kl is None:
            return FixedKL(self.beta)
        return AdaptiveKL(self.beta, self.target_kl, self.kl_horizon)

    def reference_sync(self) -> ReferenceSync | None:
        """What moves the reference, or None where it stays."""
        if not self.sync_ref_model:
            return None
        if not self.beta:
            raise ValueError("LatentGRPOConfig: sync_ref_model needs beta > 0, got 0")
        return ReferenceSync(self.ref_model_mixup_alpha, self.ref_model_sync_steps)

    def entropy_coefficient(self) -> CoefficientSchedule:
        """The weight of the entropy bonus over the run."""
        return coefficient_schedule(self.entropy_schedule, self.entropy_coef, self.entropy_coef_end)

    def uses_entropy(self) -> bool:
        """Whether there is an entropy bonus at any time."""
        return bool(self.entropy_coef or self.entropy_coef_end)

    def resample_rounds(self) -> int:
        """How often uninformative groups may be replaced; 0 without dynamic sampling."""
        wanted = _chosen(self.dynamic_sampling, self.algorithm().defaults.dynamic_sampling)
        return self.max_resample_rounds if wanted else 0


_T = TypeVar("_T")


def _chosen(given: _T | None, default: _T) -> _T:
    return default if given is None else given
