"""The demo's conversation tasks."""

from latent_rl.demo.tasks.base import SPLITS, Amounts, Task, TaskRewards
from latent_rl.demo.tasks.personalised import Personalised
from latent_rl.demo.tasks.role_play import RolePlay

__all__ = ["SPLITS", "TASKS", "Amounts", "Personalised", "RolePlay", "Task", "TaskRewards"]

TASKS: dict[str, Task] = {task.name: task for task in (RolePlay(), Personalised())}
