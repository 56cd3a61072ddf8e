"""Hidden-state replay: everything an update needs of a rollout, without the vision-language
model."""

from latent_rl.train.replay.rows import ActionOutputs, Replay, action_logits, action_outputs
from latent_rl.train.replay.traces import join_traces, replay_trace

__all__ = [
    "ActionOutputs",
    "Replay",
    "action_logits",
    "action_outputs",
    "join_traces",
    "replay_trace",
]
