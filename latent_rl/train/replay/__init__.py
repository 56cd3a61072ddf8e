"""Hidden-state replay: everything an update needs of a rollout, without the vision-language
model."""

from latent_rl.train.replay.archive import ReplayStates
from latent_rl.train.replay.feed import ReplayFeed
from latent_rl.train.replay.memory import ReplayMemory, held_bytes
from latent_rl.train.replay.packing import LAYOUTS, BatchStates, Layout
from latent_rl.train.replay.rows import (
    ActionOutputs,
    Replay,
    ReplayBatch,
    action_logits,
    action_outputs,
)
from latent_rl.train.replay.schedule import micro_batches
from latent_rl.train.replay.states import GroupStates, group_states
from latent_rl.train.replay.stores import DeviceStore, HostStore, RecomputeStore, ReplayStore

__all__ = [
    "LAYOUTS",
    "ActionOutputs",
    "BatchStates",
    "DeviceStore",
    "GroupStates",
    "HostStore",
    "Layout",
    "RecomputeStore",
    "Replay",
    "ReplayBatch",
    "ReplayFeed",
    "ReplayMemory",
    "ReplayStates",
    "ReplayStore",
    "action_logits",
    "action_outputs",
    "group_states",
    "held_bytes",
    "micro_batches",
]
