"""The settings of the token-level baseline: those of the latent run, mapped onto TRL's.

Nothing is dropped in silence: a setting is passed on under TRL's name, stated in `TOKEN_MAPPING`,
or refused by name.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

from latent_rl.train.rl_config import LatentGRPOConfig

__all__ = ["TOKEN_ALGORITHMS", "TOKEN_MAPPING", "TokenAlgorithm", "require_trl", "token_arguments"]

TOKEN_MAPPING: Mapping[str, str] = {
    "beta": "the same weight on TRL's estimate of the KL from sampled tokens; ours is exact",
    "temperature, top_k, top_p, min_p": "the distribution of tokens instead of codes; TRL scores "
    "tokens under the whole tempered distribution, ours under the truncated one that was sampled",
    "do_sample_tokens": "tokens are the actions, so they are always sampled",
    "epsilon, epsilon_high, importance_sampling_level, scale_rewards": "where they are None: the "
    "values that `loss_type` gives the latent run",
    "replay_*, use_decoder, decoder_*": "say how latent rollouts are computed and kept; "
    "TRL generates with the model's own generate and keeps no states",
    "max_reward_failure_rate, reward_failure_window": "the same",
    "stop_on_nan, max_loss, max_grad_norm_before_stop": "watch the latent trainer's updates; "
    "TRL's are not watched",
    "dynamic_sampling": "refused: TRL has none. Set it to False in both arms",
    "generation_kwargs": "passed on, but for stop_strings, which TRL cannot take",
}
"""What becomes of a setting that TRL does not have or that means something else there."""

# Say how rollouts of codes are computed; no result depends on them.
_ENGINE = (
    "use_decoder",
    "decoder_slots",
    "decoder_compile",
    "max_resample_rounds",
    "do_sample_tokens",
    "log_completions_files",
    # What stops a run; the harness keeps the first two, updates of TRL's are not watched.
    "max_reward_failure_rate",
    "reward_failure_window",
    "stop_on_nan",
    "max_loss",
    "max_grad_norm_before_stop",
)
_ENGINE_PREFIX = "replay_"
_RESOLVED = (
    "generation_batch_size",  # follows from steps_per_generation, and TRL takes one of the two
    "loss_type",
    "epsilon",
    "epsilon_high",
    "importance_sampling_level",
    "scale_rewards",
    "dynamic_sampling",
    "generation_kwargs",
)

Classes: TypeAlias = tuple[type[Any], type[Any]]
"""TRL's settings and trainer."""


def require_trl() -> Any:
    """The `trl` package.

    Raises:
        ImportError: saying how to install it.
    """
    try:
        import trl
    except ImportError as error:
        raise ImportError(
            "the token-level baseline is TRL's trainer: pip install 'latent-rl[trl]'"
        ) from error
    return trl


@dataclass(frozen=True)
class TokenAlgorithm:
    """How TRL runs an algorithm on tokens.

    Attributes:
        classes: imports TRL's settings and trainer.
        settings: what `loss_type`, advantage scale and clip range become.
    """

    classes: Callable[[], Classes]
    settings: Callable[[LatentGRPOConfig], dict[str, Any]]


def _grpo_classes() -> Classes:
    require_trl()
    from trl.trainer.grpo_config import GRPOConfig
    from trl.trainer.grpo_trainer import GRPOTrainer

    return GRPOConfig, GRPOTrainer


def _rloo_classes() -> Classes:
    require_trl()
    from trl.trainer.rloo_config import RLOOConfig
    from trl.trainer.rloo_trainer import RLOOTrainer

    return RLOOConfig, RLOOTrainer


def _in_grpo(loss_type: str) -> TokenAlgorithm:
    def settings(args: LatentGRPOConfig) -> dict[str, Any]:
        level = args.importance_sampling_level
        return {
            "loss_type": loss_type,
            "scale_rewards": _scale(args),
            "importance_sampling_level": level
            or args.algorithm().defaults.importance_sampling_level,
        }

    return TokenAlgorithm(_grpo_classes, settings)


def _scale(args: LatentGRPOConfig) -> str:
    """TRL's name of the advantage scale, the algorithm's default filled in."""
    chosen: Any = args.scale_rewards  # a bool is taken too, see AlgorithmSettings.reward_scale
    if chosen is None:
        chosen = args.algorithm().defaults.scale_rewards
    if isinstance(chosen, bool):
        return "group" if chosen else "none"
    return str(chosen)


def _rloo_settings(args: LatentGRPOConfig) -> dict[str, Any]:
    if args.scale_rewards not in (None, "none", False):
        raise ValueError(
            f"token baseline: TRL's RLOO has no scale_rewards, got {args.scale_rewards!r}; leave "
            "it at None in both arms"
        )
    return {}


GRPO_LOSSES = ("grpo", "dr_grpo", "dapo", "bnpo", "cispo", "sapo", "luspo", "vespo")
"""What both trainers call by the same name."""

TOKEN_ALGORITHMS: Mapping[str, TokenAlgorithm] = {
    **{name: _in_grpo(name) for name in GRPO_LOSSES},
    "gspo": _in_grpo("grpo"),
    "rloo": TokenAlgorithm(_rloo_classes, _rloo_settings),
}
"""By `loss_type`."""


def token_arguments(args: LatentGRPOConfig) -> Any:
    """TRL's settings (`GRPOConfig`, or `RLOOConfig` for rloo) for the same run on tokens.

    Batch sizes, seeds, schedule, logging and checkpoints are the same; so are completions per
    prompt and prompts per step.

    Raises:
        ImportError: when TRL is not installed.
        ValueError: for an algorithm or a setting that TRL does not have.
    """
    if args.loss_type not in TOKEN_ALGORITHMS:
        raise ValueError(
            f"token baseline: TRL has no trainer of loss_type {args.loss_type!r}; it has "
            f"{', '.join(sorted(TOKEN_ALGORITHMS))}"
        )
    algorithm = TOKEN_ALGORITHMS[args.loss_type]
    config, _ = algorithm.classes()
    theirs = {field.name for field in dataclasses.fields(config) if field.init}
    given = _shared(args, theirs)
    given |= algorithm.settings(args)
    clip = args.clip_range()
    given |= {"epsilon": clip.low, "epsilon_high": clip.high}
    given["generation_kwargs"] = _generation(args)
    if args.resample_rounds():
        raise ValueError(
            "token baseline: TRL has no dynamic sampling; set dynamic_sampling=False in both arms"
        )
    return config(**given)


def _shared(args: LatentGRPOConfig, theirs: set[str]) -> dict[str, Any]:
    """Fields of the same name, after a check that no other one says anything."""
    shared, lost = {}, []
    for field in dataclasses.fields(args):
        if not field.init or field.name in _RESOLVED:
            continue
        value = getattr(args, field.name)
        if field.name in theirs:
            shared[field.name] = value
        elif field.name in _ENGINE or field.name.startswith(_ENGINE_PREFIX):
            continue
        elif value != _default(field):
            lost.append(f"{field.name}={value!r}")
    if lost:
        raise ValueError(f"token baseline: TRL has no setting like {', '.join(lost)}")
    return shared


def _default(field: dataclasses.Field[Any]) -> Any:
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return field.default


def _generation(args: LatentGRPOConfig) -> dict[str, Any] | None:
    given = dict(args.generation_kwargs or {})
    if "stop_strings" in given:
        raise ValueError(
            "token baseline: TRL cannot stop at generation_kwargs['stop_strings']; use "
            "eos_token_id in both arms"
        )
    return given or None
