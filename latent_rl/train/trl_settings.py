"""Settings that `trl.GRPOConfig` has and latent RL has no use for: known by name, so that a script
can keep them where they say nothing, and refused with the reason where they ask for something.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

__all__ = ["INERT", "REFUSED", "TRLSettings"]

_NO_VLLM = "rollouts come from latent_rl.decode.Decoder: a code is chosen between trunk and head"

REFUSED: Mapping[str, str] = {
    "trust_remote_code": "code of a model repository is never run",
    "router_aux_loss_coef": "the backbone is frozen, and its routers with it",
    "cast_lm_head_to_fp32": "the vocabulary head takes no part in an update; the policy's logits "
    "are float32",
    "ds3_gather_for_generation": "rollouts read whole weights",
    "pad_to_multiple_of": "replay_layout says how updates are laid out",
    "use_vllm": _NO_VLLM,
    "use_transformers_continuous_batching": f"{_NO_VLLM}, and it refills its slots continuously",
    "use_transformers_paged": f"{_NO_VLLM}, and it refills its slots continuously",
    "multi_objective_aggregation": "rewards are summed by reward_weights, then compared",
    "top_entropy_quantile": "every kept code takes part in the loss",
    "use_adaptive_entropy": "entropy_schedule moves entropy_coef to entropy_coef_end over the run",
    "max_tool_calling_iterations": "there are no tools",
    "off_policy_mask_threshold": "epsilon, epsilon_high and delta bound what old rollouts do",
    "log_multimodal": "completions are logged as text, without the images",
    "log_completions_hub_repo": "completions are logged in output_dir and by the tracker",
    # Fields of TrainingArguments.
    "auto_find_batch_size": "a smaller batch would not hold whole groups of num_generations",
    "train_sampling_strategy": "shuffle_dataset says how prompts are ordered",
}
"""Why a setting may only stand at its default."""

INERT: Mapping[str, str] = {
    "disable_dropout": "dropout is off in rollouts and updates, whatever it says",
    "use_bias_correction_kl": "the KL is exact over the codes, so there is no estimate to correct",
    "entropy_coef_min": "read under use_adaptive_entropy alone, which is refused",
    "entropy_coef_max": "read under use_adaptive_entropy alone, which is refused",
    "entropy_coef_delta": "read under use_adaptive_entropy alone, which is refused",
    "entropy_target": "read under use_adaptive_entropy alone, which is refused",
    "transformers_continuous_batching_config": "read under use_transformers_continuous_batching "
    "alone, which is refused",
    "vllm_*": "read under use_vllm alone, which is refused",
}
"""Why a setting may have any value and changes nothing."""


@dataclass
class TRLSettings:
    """Fields of `trl.GRPOConfig` (1.16) without a counterpart here; see `REFUSED` and `INERT`.

    Defaults are TRL's, but for `pad_to_multiple_of` (TRL: "auto", which is None but on Neuron) and
    `log_multimodal` (TRL: True).
    """

    trust_remote_code: bool = False
    router_aux_loss_coef: float | None = None
    disable_dropout: bool = False
    cast_lm_head_to_fp32: bool = False
    ds3_gather_for_generation: bool = True
    pad_to_multiple_of: int | str | None = None
    use_vllm: bool = False
    vllm_mode: str = "colocate"
    vllm_model_impl: str = "vllm"
    vllm_enable_sleep_mode: bool = False
    vllm_structured_outputs_regex: str | None = None
    vllm_server_base_url: str | None = None
    vllm_server_host: str = "0.0.0.0"
    vllm_server_port: int = 8000
    vllm_server_timeout: float = 240.0
    vllm_group_port: int = 51216
    vllm_gpu_memory_utilization: float = 0.3
    vllm_max_model_length: int | None = None
    vllm_tensor_parallel_size: int = 1
    vllm_importance_sampling_correction: bool = True
    vllm_importance_sampling_mode: str = "sequence_mask"
    vllm_importance_sampling_clip_max: float | None = 3.0
    vllm_importance_sampling_clip_min: float | None = None
    vllm_importance_sampling_cap: float | None = None
    multi_objective_aggregation: str = "sum_then_normalize"
    top_entropy_quantile: float = 1.0
    use_adaptive_entropy: bool = False
    entropy_coef_min: float = 0.0
    entropy_coef_max: float = 1.0
    entropy_coef_delta: float = 0.005
    entropy_target: float = 0.2
    max_tool_calling_iterations: int | None = None
    off_policy_mask_threshold: float | None = None
    use_bias_correction_kl: bool = True
    log_multimodal: bool = False
    log_completions_hub_repo: str | None = None
    use_transformers_continuous_batching: bool = False
    transformers_continuous_batching_config: dict[str, Any] | str | None = None
    use_transformers_paged: bool = False

    def check_trl_settings(self) -> None:
        """Refuse what asks for something latent RL does not do.

        Raises:
            ValueError: naming the setting and the reason.
        """
        if self.pad_to_multiple_of == "auto":
            self.pad_to_multiple_of = None
        for name, reason in REFUSED.items():
            value, default = getattr(self, name), getattr(type(self), name)
            if value != default:
                raise ValueError(
                    f"LatentGRPOConfig: {name} must be {default!r} ({reason}), got {value!r}"
                )
