"""The whole method on real images in minutes: see ``latent-rl demo``."""

from latent_rl.demo.pipeline import run
from latent_rl.demo.result import ArmResult, DemoResult
from latent_rl.demo.settings import DemoSettings

__all__ = ["ArmResult", "DemoResult", "DemoSettings", "run"]
