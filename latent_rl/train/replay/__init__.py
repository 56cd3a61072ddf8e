"""Hidden-state replay: everything an update needs of a rollout, without the vision-language
model."""

from latent_rl.train.replay.rows import Replay, action_logits
from latent_rl.train.replay.traces import join_traces, replay_trace

__all__ = ["Replay", "action_logits", "join_traces", "replay_trace"]
