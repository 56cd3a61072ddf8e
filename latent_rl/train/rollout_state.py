"""Where an RL run stands within its current rollout, for checkpoints."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor

from latent_rl.train.losses import Normaliser
from latent_rl.train.replay import Replay
from latent_rl.train.rollout_record import RolloutRecord

if TYPE_CHECKING:
    from latent_rl.train.rl_trainer import LatentGRPOTrainer

__all__ = ["RolloutState"]


class RolloutState:
    """A stateful part: the position in the rollout, and its replay if micro-steps of it remain.

    Between two rollouts a few numbers are enough: the next rollout is made of the policy and of
    seeds that follow from the position. In the middle of one the policy has moved since, so the
    replay itself (states, codes, old log-probabilities, the reference's logits) is kept, one file
    per process.
    """

    def __init__(self, trainer: LatentGRPOTrainer) -> None:
        self._trainer = trainer

    def state_dict(self) -> dict[str, Any]:
        """Return the position, and replay and normaliser in the middle of a rollout."""
        trainer = self._trainer
        state: dict[str, Any] = {
            "micro_step": trainer.micro_step,
            "micro_steps_per_rollout": trainer.args.micro_steps_per_rollout,
        }
        replay, normaliser, record = trainer._replay, trainer._normaliser, trainer._words
        if trainer.micro_step % trainer.args.micro_steps_per_rollout == 0:
            return state
        if replay is None or normaliser is None or record is None:
            raise RuntimeError("LatentGRPOTrainer: in the middle of a rollout without its replay")
        tensors, meta = replay.state()
        numbers = {f.name: getattr(normaliser, f.name) for f in dataclasses.fields(normaliser)}
        return {
            **state,
            "replay": {"tensors": tensors, "meta": meta},
            "normaliser": numbers,
            "record": record.state_dict(),
        }

    def load_state_dict(self, state_dict: Mapping[str, Any], /) -> None:
        """Put the trainer where the saved one was.

        Raises:
            ValueError: a rollout cut into another number of micro-steps.
        """
        trainer = self._trainer
        kept, ours = state_dict["micro_steps_per_rollout"], trainer.args.micro_steps_per_rollout
        if kept != ours:
            raise ValueError(
                f"steps_per_generation * num_iterations was {kept} in the run that wrote the "
                f"checkpoint, it is {ours} now; resume with the same settings"
            )
        trainer.micro_step = int(state_dict["micro_step"])
        trainer._replay = trainer._normaliser = trainer._words = None
        replay = state_dict.get("replay")
        if replay is not None:
            model = trainer.latent_model
            trainer._replay = Replay.from_state(replay["tensors"], replay["meta"], model)
            trainer._words = RolloutRecord.from_state(state_dict["record"])
            numbers: dict[str, Any] = {
                name: value.to(model.device) if isinstance(value, Tensor) else value
                for name, value in state_dict["normaliser"].items()
            }
            trainer._normaliser = Normaliser(**numbers)
