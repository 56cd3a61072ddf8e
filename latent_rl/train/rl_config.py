"""Settings of latent-action RL, under TRL's names."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from latent_rl.train.algorithm_settings import AlgorithmSettings
from latent_rl.train.arguments import BaseArguments
from latent_rl.train.completions_log import CompletionsLog
from latent_rl.train.replay.memory import SPILLS, ReplayMemory
from latent_rl.train.replay.packing import LAYOUTS, Layout
from latent_rl.train.sampling import SampledDistribution
from latent_rl.train.trl_settings import TRLSettings

__all__ = ["DECODER_OPTIONS", "LatentGRPOConfig"]

DECODER_OPTIONS = ("min_new_tokens", "eos_token_id", "stop_strings", "suppress_tokens")


@dataclass
class LatentGRPOConfig(AlgorithmSettings, TRLSettings, BaseArguments):
    """`BaseArguments` plus `AlgorithmSettings` plus how rollouts are made and used; names and
    meanings as in `trl.GRPOConfig` with latent codes in the place of tokens. What TRL has and this
    has not (`TRLSettings`) is refused by name.

    num_generations_eval       the same in evaluation; None takes num_generations
    steps_per_generation       micro-batches a rollout is cut into; None takes
                               gradient_accumulation_steps
    generation_batch_size      completions of one rollout on all processes, in the place of
                               steps_per_generation
    model_init_kwargs          for loading the backbone, where the trainer is given a directory
    chat_template_kwargs       further arguments of the chat template, such as enable_thinking; a
                               row's column of this name adds to them
    num_iterations             passes over a rollout
    temperature .. min_p       distribution of the codes, which is also the one that is scored
    do_sample_tokens           sample tokens too instead of taking the most likely one under a code
    repetition_penalty, cache_implementation  for the backbone's own generate (use_decoder=False)
    reward_weights             one per reward function; None is all 1
    max_reward_failure_rate    share of completions on which a reward function may fail before the
                               run stops; None never stops for a rate
    reward_failure_window      rollouts over which that share is taken
    mask_truncated_completions leave completions without an end out of the loss
    replay_dtype               dtype of the states kept for the updates, e.g. "bfloat16"; None keeps
                               the rollout's, or bfloat16 on CUDA when bf16=True
    replay_memory_gb           10^9 bytes of states a process keeps on its device between a rollout
                               and its updates; None is unlimited
    replay_spill               beyond that: "host" moves states to host memory, "recompute" runs the
                               trunk again in every update
    replay_layout              input of the policy in an update: "packed" has real positions alone
                               and a prompt once for its completions, "padded" one row each
    use_decoder                roll out with `latent_rl.decode.Decoder`; False takes the model's own
                               generate, slower and with every option of transformers
    decoder_slots              completions decoded at once, at most; None takes all of a rollout
    decoder_compile            send the decoder's step through torch.compile: minutes once, then
                               faster rollouts; on the CPU two to three times for small models
    generation_kwargs          min_new_tokens, eos_token_id, stop_strings, suppress_tokens for the
                               decoder; anything that the backbone's generate takes without it
    shuffle_dataset            whether prompts come in random order
    log_completions            write the completions of every rollout with codes, rewards and
                               advantages: `completions/completions_<rollout>.jsonl` in output_dir,
                               a table in the tracker of report_to, and on the console
    log_completions_files      rollouts whose files are kept, the newest
    log_unique_prompts         show one completion per prompt in tracker and console
    num_completions_to_print   completions printed per rollout; None prints all
    """

    learning_rate: float = 1e-6
    logging_steps: float = 10
    num_generations_eval: int | None = None
    steps_per_generation: int | None = None
    generation_batch_size: int | None = None
    num_iterations: int = 1
    model_init_kwargs: dict[str, Any] | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float | None = None
    do_sample_tokens: bool = False
    repetition_penalty: float = 1.0
    cache_implementation: str | None = None
    reward_weights: list[float] | None = None
    max_reward_failure_rate: float | None = 0.5
    reward_failure_window: int = 8
    mask_truncated_completions: bool = False
    replay_dtype: str | None = None
    replay_memory_gb: float | None = None
    replay_spill: str = "host"
    replay_layout: str = "packed"
    use_decoder: bool = True
    decoder_slots: int | None = None
    decoder_compile: bool = False
    generation_kwargs: dict[str, Any] | None = None
    shuffle_dataset: bool = True
    log_completions: bool = False
    log_completions_files: int = 100
    log_unique_prompts: bool = False
    num_completions_to_print: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_trl_settings()
        self._settle_rollout_size()
        self.check_algorithm()
        self._check_sizes()
        self._check_decoding()
        self._check_replay()
        self.distribution()

    def _settle_rollout_size(self) -> None:
        """Bring steps_per_generation and generation_batch_size, of which one may be given, into
        agreement; both stay set, so that a copy with other settings agrees too."""
        step = self.per_device_train_batch_size * self.world_size
        wanted = self.generation_batch_size
        if wanted is None:
            if self.steps_per_generation is None:
                self.steps_per_generation = self.gradient_accumulation_steps
        elif self.steps_per_generation is None and wanted > 0 and wanted % step == 0:
            self.steps_per_generation = wanted // step
        elif wanted < 1 or wanted != step * (self.steps_per_generation or 0):
            raise ValueError(
                f"LatentGRPOConfig: generation_batch_size must be a multiple of "
                f"per_device_train_batch_size * processes ({step}), and that multiple is "
                f"steps_per_generation ({self.steps_per_generation}), got {wanted}"
            )

    def _check_sizes(self) -> None:
        for name in (
            "num_iterations",
            "max_completion_length",
            "steps_per_generation",
            "reward_failure_window",
            "log_completions_files",
        ):
            if getattr(self, name) < 1:
                raise ValueError(
                    f"LatentGRPOConfig: {name} must be >= 1, got {getattr(self, name)}"
                )
        rate = self.max_reward_failure_rate
        if rate is not None and not 0 <= rate <= 1:
            raise ValueError(
                f"LatentGRPOConfig: max_reward_failure_rate must be in [0, 1] or None, got {rate}"
            )
        if self.rollout_size % self.num_generations:
            raise ValueError(
                "LatentGRPOConfig: per_device_train_batch_size * steps_per_generation "
                f"({self.rollout_size}) must be a multiple of num_generations "
                f"({self.num_generations}), so that a group stays on one process"
            )

    def _check_decoding(self) -> None:
        if self.decoder_slots is not None and self.decoder_slots < 1:
            raise ValueError(
                f"LatentGRPOConfig: decoder_slots must be >= 1 or None, got {self.decoder_slots}"
            )
        for name in ("repetition_penalty", "cache_implementation"):
            if self.use_decoder and getattr(self, name) != getattr(type(self), name):
                raise ValueError(
                    f"LatentGRPOConfig: {name} needs use_decoder=False (the decoder has none), "
                    f"got {getattr(self, name)!r}"
                )
        unknown = sorted(set(self.generation_kwargs or {}) - set(DECODER_OPTIONS))
        if self.use_decoder and unknown:
            raise ValueError(
                f"LatentGRPOConfig: the decoder takes generation_kwargs "
                f"{', '.join(DECODER_OPTIONS)}, got {', '.join(unknown)}; "
                "use_decoder=False passes any to the backbone's generate"
            )

    def _check_replay(self) -> None:
        for name, known in (("replay_spill", SPILLS), ("replay_layout", LAYOUTS)):
            if getattr(self, name) not in known:
                raise ValueError(
                    f"LatentGRPOConfig: {name} must be one of {', '.join(sorted(known))}, "
                    f"got {getattr(self, name)!r}"
                )
        if self.replay_memory_gb is not None and not self.replay_memory_gb > 0:
            raise ValueError(
                f"LatentGRPOConfig: replay_memory_gb must be > 0 or None, "
                f"got {self.replay_memory_gb}"
            )
        dtype = getattr(torch, self.replay_dtype or "float32", None)
        if not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
            raise ValueError(
                "LatentGRPOConfig: replay_dtype must name a floating dtype of torch or be None, "
                f"got {self.replay_dtype!r}"
            )

    def replay_memory(self) -> ReplayMemory:
        """The budget for states, what happens beyond it, and the dtype to keep them in."""
        dtype = getattr(torch, self.replay_dtype) if self.replay_dtype else None
        if dtype is None and self.bf16 and self.device.type == "cuda":
            # The tower computes in bfloat16 under autocast, so nothing is lost by keeping it.
            dtype = torch.bfloat16
        budget = None if self.replay_memory_gb is None else int(self.replay_memory_gb * 1e9)
        return ReplayMemory(budget, SPILLS[self.replay_spill], dtype)

    def layout(self) -> Layout:
        """How micro-batches are laid out for the policy."""
        return LAYOUTS[self.replay_layout]

    @property
    def rollout_size(self) -> int:
        """Completions of one rollout on one process."""
        return self.per_device_train_batch_size * (self.steps_per_generation or 1)

    @property
    def micro_steps_per_rollout(self) -> int:
        """Micro-batches one rollout serves."""
        return (self.steps_per_generation or 1) * self.num_iterations

    @property
    def policy_moves_within_rollout(self) -> bool:
        """Whether an update between two uses of a rollout makes the current policy another than the
        one that sampled."""
        return self.gradient_accumulation_steps % self.micro_steps_per_rollout != 0

    def completions_log(
        self, output_dir: Path, gather: Callable[[list[Any]], list[Any]]
    ) -> CompletionsLog | None:
        """Where completions are logged, or None without `log_completions`."""
        if not self.log_completions:
            return None
        return CompletionsLog(
            output_dir / "completions",
            files=self.log_completions_files,
            unique_prompts=self.log_unique_prompts,
            shown=self.num_completions_to_print,
            gather=gather,
            main=self.process_index == 0,
        )

    def backbone_options(self) -> dict[str, Any]:
        """What the backbone's own generate is told beside length and sampling."""
        options = dict(self.generation_kwargs or {})
        if self.repetition_penalty != 1.0:
            options["repetition_penalty"] = self.repetition_penalty
        if self.cache_implementation is not None:
            options["cache_implementation"] = self.cache_implementation
        return options

    def distribution(self) -> SampledDistribution:
        """The distribution codes are sampled from and scored under."""
        return SampledDistribution(self.temperature, self.top_k, self.top_p, self.min_p or 0.0)
