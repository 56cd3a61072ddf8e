"""What a judge may cost: counted as requests, tokens and money, and stopped there."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from typing import Any

from latent_rl.rewards.failures import RewardStop
from latent_rl.rewards.judge.errors import JudgeError
from latent_rl.rewards.judge.settings import JudgeSettings

__all__ = ["Budget"]


class Budget:
    """Counts what requests use, and refuses further ones once a limit is reached.

    Its state is part of a trainer's checkpoints, so that a resumed run does not start counting
    anew. Each process counts for itself.
    """

    def __init__(self, settings: JudgeSettings) -> None:
        self.settings = settings
        self.requests = self.input_tokens = self.output_tokens = 0
        self._lock = threading.Lock()

    @property
    def cost(self) -> float:
        """Money used, at the settings' prices (0 without prices)."""
        price_in = self.settings.price_per_million_input_tokens or 0.0
        price_out = self.settings.price_per_million_output_tokens or 0.0
        return (self.input_tokens * price_in + self.output_tokens * price_out) / 1e6

    def take_request(self) -> None:
        """Count a request about to be sent.

        Raises:
            RewardStop: a limit is reached and the settings say to stop.
            JudgeError: kind "budget", a limit is reached and the settings say to go on without.
        """
        with self._lock:
            spent = self._spent()
            if spent is None:
                self.requests += 1
                return
        if self.settings.stop_on_budget:
            raise RewardStop(f"judge: the budget is spent: {spent}")
        raise JudgeError("budget", f"judge: the budget is spent: {spent}")

    def add_usage(self, usage: Any) -> None:
        """Count the `usage` of an answer.

        Raises:
            RewardStop: the server reports none although tokens or cost are limited.
        """
        tokens = [_count(usage, name) for name in ("prompt_tokens", "completion_tokens")]
        limited = self.settings.max_total_tokens is not None or self.settings.max_cost is not None
        if limited and None in tokens:
            raise RewardStop(
                "judge: max_total_tokens and max_cost need a server that reports usage, and this "
                "one does not; limit max_requests instead"
            )
        with self._lock:
            self.input_tokens += tokens[0] or 0
            self.output_tokens += tokens[1] or 0

    def _spent(self) -> str | None:
        settings, tokens = self.settings, self.input_tokens + self.output_tokens
        for name, used in (
            ("max_requests", self.requests),
            ("max_total_tokens", tokens),
            ("max_cost", self.cost),
        ):
            limit = getattr(settings, name)
            if limit is not None and used >= limit:
                return f"{used:g} of {name}={limit:g} used"
        return None

    def state_dict(self) -> dict[str, Any]:
        """Return the counts."""
        return {
            "requests": self.requests,
            "input_tokens": self.input_tokens,
            "output_tokens": self.output_tokens,
        }

    def load_state_dict(self, state_dict: Mapping[str, Any], /) -> None:
        """Take over what `state_dict` returned."""
        self.requests = int(state_dict["requests"])
        self.input_tokens = int(state_dict["input_tokens"])
        self.output_tokens = int(state_dict["output_tokens"])


def _count(usage: Any, name: str) -> int | None:
    value = usage.get(name) if isinstance(usage, Mapping) else None
    return value if isinstance(value, int) and not isinstance(value, bool) and value >= 0 else None
