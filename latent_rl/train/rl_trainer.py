"""LatentGRPOTrainer: the GRPO family over latent codes, on transformers.Trainer."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from accelerate.utils import gather_object
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import DataLoader
from transformers import TrainerCallback

from latent_rl.train.advantages import group_advantages
from latent_rl.train.base_trainer import BaseTrainer
from latent_rl.train.completions_log import table_writers
from latent_rl.train.experience import scored_rollout
from latent_rl.train.forwarding import forward_through
from latent_rl.train.freezing import freeze, set_training_modes
from latent_rl.train.losses import Normaliser
from latent_rl.train.regularisation import Regularisation
from latent_rl.train.replay import Replay, ReplayFeed, ReplayStates, action_outputs
from latent_rl.train.rl_config import LatentGRPOConfig
from latent_rl.train.rollout import PromptRenderer, Rollout, RolloutWorker
from latent_rl.train.rollout_metrics import rollout_metrics, update_metrics
from latent_rl.train.rollout_record import BatchRecord, RolloutRecord
from latent_rl.train.rollout_sampler import RolloutSampler
from latent_rl.train.rollout_state import RolloutState
from latent_rl.train.run_inputs import (
    check_evaluation_rows,
    check_rows,
    model_of,
    output_dir_of,
    processor_of,
    refuse_trl_arguments,
    renderer_of,
)
from latent_rl.train.run_rewards import Reward, RunRewards
from latent_rl.train.samplers import GroupedRepeatSampler
from latent_rl.train.scoring import Scorer, score_update
from latent_rl.train.spending import SpendingMeter
from latent_rl.train.values import ValueHead, attach_value_head, explained_variance

if TYPE_CHECKING:
    from latent_rl.models import LatentActionModel
    from latent_rl.nn import LatentPolicy

__all__ = ["LatentGRPOTrainer"]


class LatentGRPOTrainer(BaseTrainer):
    """Reinforcement learning of the latent policy; nothing else moves.

    The arguments are those of `trl.GRPOTrainer`, in its order.

    model             a LatentActionModel, normally after `BehaviourCloning`, or the directory of a
                      saved one
    reward_funcs      one reward or several: functions (`latent_rl.rewards.protocol`), reward models
                      or names of reward models
    args              `LatentGRPOConfig`; None takes the defaults and "<model>-LatentGRPO" as
                      directory
    train_dataset     rows with `prompt` (chat messages or text), `images` or `image`, and any
                      columns the rewards ask for; needs a length
    eval_dataset      rows of the same form, several such sets by name, or None
    processing_class  the model's processor; None loads the one beside the model, or its base
                      model's
    reward_processing_classes  tokenizers (or processors) of the reward models, one per reward; None
                      loads each model's own
    optimizers        optimiser and schedule of your own, as in `transformers.Trainer`
    quantization_config .. environment_factory  TRL's; refused with the reason
    prompt_renderer   (processing_class, rows) -> inputs; default `latent_rl.data.render_prompts`

    Each rollout's hidden states are kept (`Replay`): the updates, the old policy and the reference
    run only the policy's small tower on them. The KL to the reference, a copy of the initial
    policy, is exact over the K codes.

    Raises:
        TypeError, ValueError: naming the argument that cannot be, before anything runs.
    """

    args: LatentGRPOConfig

    def __init__(
        self,
        model: LatentActionModel | str | Path,
        reward_funcs: Reward | Sequence[Reward],
        args: LatentGRPOConfig | None = None,
        train_dataset: Any | None = None,
        eval_dataset: Any | None = None,
        processing_class: Any | None = None,
        reward_processing_classes: Any | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[Optimizer | None, LRScheduler | None] = (None, None),
        quantization_config: None = None,
        peft_config: None = None,
        tools: None = None,
        rollout_func: None = None,
        environment_factory: None = None,
        *,
        prompt_renderer: PromptRenderer | None = None,
    ) -> None:
        refuse_trl_arguments(
            quantization_config=quantization_config,
            peft_config=peft_config,
            tools=tools,
            rollout_func=rollout_func,
            environment_factory=environment_factory,
        )
        # A renderer of the user's own may read prompts that latent_rl.data does not.
        reads = prompt_renderer is None
        check_rows(train_dataset, "train_dataset", read_prompt=reads)
        check_evaluation_rows(eval_dataset, read_prompt=reads)
        source, model = model, model_of(model, args.model_init_kwargs if args else None)
        args = args or LatentGRPOConfig(output_dir=output_dir_of(source, model))
        processing_class = processor_of(processing_class, source, model)
        renderer = renderer_of(prompt_renderer, processing_class, args.chat_template_kwargs)
        self.rewards = RunRewards(reward_funcs, reward_processing_classes, args)
        self.value_head: ValueHead | None = None
        if args.algorithm().uses_values:
            self.value_head = attach_value_head(model, detach=args.detach_value)
        freeze(model, [m for m in (model.latent.policy, self.value_head) if m is not None])
        self.micro_step = 0
        self._replay: Replay | None = None
        self._words: RolloutRecord | None = None
        self._last_batch: BatchRecord | None = None
        self._normaliser: Normaliser | None = None
        self._eval_batches = 0
        self._feed = ReplayFeed(args)
        super().__init__(
            model=model,
            args=args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            data_collator=list,
            callbacks=callbacks,
            optimizers=optimizers,
        )
        self.meter = SpendingMeter()
        self.add_callback(self.meter)
        self.stateful.add("spending", self.meter, per_rank=True)
        self.worker = RolloutWorker(args, self.rewards.functions, processing_class, renderer)
        self.sampler = RolloutSampler(
            args,
            self.worker,
            columns=lambda: {"trainer_state": self.state, **self.rewards.log.arguments()},
            autocast=self.accelerator.autocast,
            made=self._made,
        )
        self.reference: LatentPolicy | None = None
        if args.beta:
            self.reference = copy.deepcopy(self.latent_model.latent.policy)
            self.reference.requires_grad_(False).eval()
            # The reference is the policy the first run began with, whatever this one was given.
            self.stateful.add("reference", self.reference)
        self.rewards.carry_in(self.stateful)
        self.regularisation = Regularisation(
            args, model.latent.policy, self.reference, self.accelerator.gather
        )
        self.add_callback(self.regularisation)
        self.stateful.add("kl_controller", self.regularisation.controller)
        if self.value_head is not None:
            self.stateful.add("value_head", self.value_head)
        self.stateful.add("rollout", RolloutState(self), per_rank=True)
        self.completions = args.completions_log(self.output_dir, gather_object)

    def _start_anew(self) -> None:
        super()._start_anew()
        self.micro_step = 0
        self.rewards.failures.reset()
        self.regularisation.reset()
        self._replay = self._normaliser = None

    # Data: the loader yields row numbers, so that a rollout's rows are read once and not once per
    # completion and micro-batch.

    def get_train_dataloader(self) -> DataLoader[int]:
        """Return the loader of row numbers: one batch per micro-step, constant over a rollout."""
        args, dataset = self.args, cast(Any, self.train_dataset)
        local = args.rollout_size
        sampler = GroupedRepeatSampler(
            len(dataset),
            group_size=args.num_generations,
            prompts_per_chunk=local * args.world_size // args.num_generations,
            repeat=args.micro_steps_per_rollout,
            seed=args.seed,
            shuffle=args.shuffle_dataset,
        )
        self.epoch_sampler = sampler
        numbers: Any = range(len(dataset))
        loader = DataLoader(
            numbers, batch_size=local, sampler=sampler, collate_fn=list, drop_last=True
        )
        prepared: DataLoader[int] = self.accelerator.prepare(loader)
        return prepared

    def training_step(
        self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None
    ) -> Tensor:
        """As `Trainer.training_step`, timing rollout and update apart."""
        with self.meter.step():
            return super().training_step(model, inputs, num_items_in_batch)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add what the run has spent to the logs of training steps."""
        if "loss" in logs or "train_runtime" in logs:
            accelerator = self.accelerator
            spent = self.meter.flush(self.state.global_step, accelerator.gather, accelerator.device)
            logs = {**logs, **spent}
        super().log(logs, start_time)

    def _prepare_inputs(self, inputs: Any) -> Any:
        """Turn the row numbers of a micro-step into its share of the current rollout's replay."""
        args = self.args
        rollout_number, within = divmod(self.micro_step, args.micro_steps_per_rollout)
        if within == 0 or self._replay is None:
            with self.meter.rollout():
                self._replay = self._new_replay(inputs, rollout_number)
                self._log_completions(rollout_number)
        batch = self._feed.take(self._replay, self.micro_step)
        self.micro_step += 1
        return self._scorer().when_used(batch)

    # Rollout.

    def _new_replay(self, numbers: Sequence[int], rollout_number: int) -> Replay:
        model, args = self.latent_model, self.args
        set_training_modes(model, [])
        made = self.sampler.training(model, self.train_dataset, numbers, rollout_number)
        rollout = made.rollout
        if args.resample_rounds():
            self.averages.add({"resample_rounds": float(made.rounds)})
        self.rewards.failures.check(self.accelerator.gather, gather_object, model.device)
        self._words = RolloutRecord.of(rollout)
        keep = rollout.completion_mask & rollout.keep_mask[:, None] & (rollout.codes >= 0)
        if args.mask_truncated_completions:
            keep = keep & rollout.terminated[:, None]
        memory = args.replay_memory()
        replay = Replay(
            states=ReplayStates.of(rollout.groups, model, memory.dtype),
            layout=args.layout(),
            codes=rollout.codes,
            keep_mask=keep,
            advantages=torch.zeros_like(rollout.rewards),
            seeds=rollout.seeds,
        )
        self._normaliser = Normaliser(
            args.max_completion_length,
            self.accelerator.gather(keep.sum().float()).mean() / (args.steps_per_generation or 1),
        )
        scores = self._scorer()(replay)
        self._record_rollout(rollout, scores.logprobs, keep)
        self.averages.add(memory.report(rollout.groups, rollout.forecast_bytes))
        beta, gather = self.regularisation.beta, self.accelerator.gather
        estimate = args.estimator()(scored_rollout(rollout, keep, scores, args, beta, gather))
        if scores.values is not None and estimate.returns is not None:
            known = explained_variance(scores.values, estimate.returns, keep)
            self.averages.add({"val/explained_variance": known})
        moves = args.policy_moves_within_rollout
        return dataclasses.replace(
            replay,
            advantages=estimate.advantages.to(torch.float32),
            # While the policy has not moved its own log-probabilities are the old ones, exactly.
            old_logprobs=scores.logprobs if moves else None,
            support=scores.support if moves else None,
            ref_logits=scores.ref_logits,
            old_values=scores.values,
            returns=estimate.returns,
        )

    def _log_completions(self, rollout_number: int) -> None:
        if self.completions is not None and self._words is not None and self._replay is not None:
            self.completions.add(
                self._words,
                self._replay.advantages,
                rollout=rollout_number,
                step=self.state.global_step,
                writers=table_writers(self.callback_handler.callbacks),
            )

    def _scorer(self) -> Scorer:
        args = self.args
        return Scorer(
            policy=self.latent_model.latent.policy,
            reference=self.reference,
            value_head=self.value_head,
            distribution=args.distribution(),
            batch_size=args.per_device_train_batch_size,
            autocast=self.accelerator.autocast,
            needs_logprobs=args.policy_moves_within_rollout or args.puts_kl_in_reward(),
            needs_reference=args.num_iterations > 1
            or args.puts_kl_in_reward()
            # A rollout keeps the reference it began with.
            or (args.sync_ref_model and args.policy_moves_within_rollout),
        )

    def _record_rollout(self, rollout: Rollout, scored: Tensor | None, keep: Tensor) -> None:
        args = self.args
        std = group_advantages(
            rollout.rewards, args.num_generations, args.reward_scale(), rollout.keep_mask
        ).group_std
        codes = self.latent_model.latent_config.num_codes
        metrics = rollout_metrics(rollout, std, codes, self.accelerator.gather)
        if scored is not None:
            difference = (scored - rollout.logprobs).abs()[keep]
            metrics["sampling/sampling_logp_difference/mean"] = difference.mean()
        self.averages.add({**metrics, **self.rewards.log.flush(gather_object)})

    def _made(self, rollout: Rollout) -> None:
        self.rewards.failures.add(rollout)
        self.meter.count(len(rollout), int(rollout.completion_mask.sum()))

    # Update.

    def compute_loss(
        self,
        model: nn.Module,
        inputs: Any,
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """Return the algorithm's loss on a share of the replay."""
        inner, args = self.latent_model, self.args
        self._last_batch = BatchRecord.of(inputs, self._words)
        # Dropout would make the scored policy another than the one that sampled; recomputing
        # activations needs train mode.
        set_training_modes(inner, [inner.latent.policy] if inner.is_gradient_checkpointing else [])
        policy = inner.latent.policy
        head = self.value_head
        with self.accelerator.autocast():
            outputs = forward_through(model, inner, lambda: action_outputs(policy, inputs, head))
        terms, entropy = score_update(outputs, inputs, args.distribution())
        if self._normaliser is None:
            raise RuntimeError("LatentGRPOTrainer: compute_loss before the first rollout")
        regularisation = self.regularisation
        result = args.algorithm().loss(
            terms, settings=args.loss_settings(regularisation.beta), normaliser=self._normaliser
        )
        regularisation.note(terms)
        progress = self.state.global_step / max(1, self.state.max_steps)
        bonus, logged = regularisation.entropy_bonus(entropy, terms.keep_mask, progress)
        loss = result.loss if bonus is None else result.loss - bonus
        metrics = {**update_metrics(terms, result, entropy), **logged}
        if terms.kl is not None:
            metrics["beta"] = regularisation.beta
        self.averages.add(metrics)
        return (loss, {}) if return_outputs else loss

    def _handle(self, inputs: Any) -> BatchRecord | None:
        return self._last_batch

    def _describe(self, handle: BatchRecord) -> tuple[dict[str, Tensor], dict[str, Any]]:
        return handle.tensors, handle.in_words()

    # Evaluation.

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Roll out the evaluation prompts with the same seeds every time and report the rewards."""
        self._eval_batches = 0
        result: dict[str, float] = super().evaluate(*args, **kwargs)
        return result

    def prediction_step(
        self,
        model: nn.Module,
        inputs: Any,
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[None, None, None]:
        """Roll out a batch of evaluation rows and record its metrics; there is no loss."""
        args, inner = self.args, self.latent_model
        group = args.num_generations_eval or args.num_generations
        rollout = self.sampler.evaluation(inner, inputs, self._eval_batches, group)
        self._eval_batches += 1
        std = group_advantages(
            rollout.rewards, group, args.reward_scale(), rollout.keep_mask
        ).group_std
        metrics = rollout_metrics(
            rollout, std, inner.latent_config.num_codes, self.accelerator.gather
        )
        metrics |= self.rewards.log.flush(gather_object)
        self.eval_averages.add({**metrics, "rollout_seconds": rollout.seconds})
        return None, None, None
