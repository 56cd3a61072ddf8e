"""The training stages, one object each."""

from latent_rl.train.stages.base import Batch, CosineSchedule, Stage, StageOutput
from latent_rl.train.stages.behaviour_cloning import BehaviourCloning
from latent_rl.train.stages.inverse_warmup import InverseWarmup
from latent_rl.train.stages.joint import Joint
from latent_rl.train.stages.projector_warmup import ProjectorWarmup
from latent_rl.train.stages.task_sft import TaskSFT

__all__ = [
    "Batch",
    "BehaviourCloning",
    "CosineSchedule",
    "InverseWarmup",
    "Joint",
    "ProjectorWarmup",
    "Stage",
    "StageOutput",
    "TaskSFT",
]
