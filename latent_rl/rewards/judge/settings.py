"""Settings of a judge: where it is, how hard it may be asked, and what it may cost."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

__all__ = ["JudgeSettings"]

_ABOVE_ZERO = (
    "max_concurrency",
    "timeout",
    "total_timeout",
    "backoff",
    "max_backoff",
    "max_tokens",
    "max_response_bytes",
    "max_chars",
    "max_images",
    "max_image_pixels",
    "max_image_bytes",
    "cache_max_bytes",
    "max_requests",
    "max_total_tokens",
    "max_cost",
)
_RESERVED_BODY = ("model", "messages", "temperature", "max_tokens", "stream", "n")


@dataclass(frozen=True)
class JudgeSettings:
    """An OpenAI-compatible endpoint and the limits it is asked under.

    model              the model's name at the endpoint
    base_url           up to and including the version, such as "http://localhost:8000/v1"
    api_key_env        environment variable that holds the API key; None sends none. The key is read
                       from there for each request and kept nowhere.
    temperature, max_tokens, extra_body  of the request; `extra_body` is merged into it
    json_mode          ask for `response_format: json_object`; off for servers without it
    max_concurrency    requests at once
    timeout            seconds for one request, its whole body included
    total_timeout      seconds for all judgements of one batch, retries and waits included
    max_retries        further attempts after a timeout, a lost connection, 408, 409, 429, 5xx or a
                       body that is no chat completion
    backoff, max_backoff  seconds: before retry k a random time up to min(max_backoff,
                       backoff * 2^(k - 1)), or what Retry-After asks for if that is longer
    max_response_bytes of a body
    max_chars          of each text shown to the judge; longer ones are cut, and marked as cut
    send_images        show the row's images
    max_images, max_image_pixels, max_image_bytes  bounds of what is shown: the first images,
                       scaled down, as JPEG
    cache_dir          directory of judgements already made; None asks each time. Several processes
                       may share it.
    cache_max_bytes    above it the judgements unused for longest are deleted
    max_requests, max_total_tokens, max_cost  budget of one run on each process; None is no limit.
                       Retries count. Tokens and cost are known only after an answer, so they may be
                       overshot by the requests in flight.
    price_per_million_input_tokens, price_per_million_output_tokens  for `max_cost`, in its currency
    stop_on_budget     whether a spent budget stops the run (True) or fails each further judgement

    Raises:
        ValueError: for a value that cannot be, or an `api_key_env` that is not set.
    """

    model: str
    base_url: str
    api_key_env: str | None = None
    temperature: float = 0.0
    max_tokens: int = 1024
    extra_body: Mapping[str, Any] = field(default_factory=dict)
    json_mode: bool = True
    max_concurrency: int = 16
    timeout: float = 60.0
    total_timeout: float = 600.0
    max_retries: int = 4
    backoff: float = 1.0
    max_backoff: float = 30.0
    max_response_bytes: int = 2**20
    max_chars: int = 8000
    send_images: bool = True
    max_images: int = 4
    max_image_pixels: int = 768 * 768
    max_image_bytes: int = 2**19
    cache_dir: Path | None = None
    cache_max_bytes: int = 2**30
    max_requests: int | None = None
    max_total_tokens: int | None = None
    max_cost: float | None = None
    price_per_million_input_tokens: float | None = None
    price_per_million_output_tokens: float | None = None
    stop_on_budget: bool = True

    def __post_init__(self) -> None:
        if not self.model:
            raise ValueError("JudgeSettings: model must not be empty")
        self._check_url()
        for name in _ABOVE_ZERO:
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"JudgeSettings: {name} must be > 0, got {value}")
        for name in ("temperature", "max_retries"):
            if getattr(self, name) < 0:
                raise ValueError(f"JudgeSettings: {name} must be >= 0, got {getattr(self, name)}")
        taken = sorted(set(self.extra_body) & set(_RESERVED_BODY))
        if taken:
            raise ValueError(f"JudgeSettings: extra_body must not set {', '.join(taken)}")
        prices = (self.price_per_million_input_tokens, self.price_per_million_output_tokens)
        if self.max_cost is not None and (prices[0] is None or prices[1] is None):
            raise ValueError(
                "JudgeSettings: max_cost needs price_per_million_input_tokens and "
                "price_per_million_output_tokens"
            )
        self.headers()

    def _check_url(self) -> None:
        parts = urlsplit(self.base_url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError("JudgeSettings: base_url must be http(s)://host/..., got another form")
        # URLs are logged by HTTP clients; whatever is secret in one would be too. The message must
        # not repeat it either.
        if parts.username or parts.password or parts.query or parts.fragment:
            raise ValueError(
                "JudgeSettings: base_url must hold no user, password, query or fragment "
                "(the key goes into the environment variable that api_key_env names)"
            )

    @property
    def url(self) -> str:
        """Where requests go."""
        return f"{self.base_url.rstrip('/')}/chat/completions"

    def headers(self) -> dict[str, str]:
        """The headers of a request, the key among them.

        Raises:
            ValueError: the key's variable is not set, or holds what no header can.
        """
        if self.api_key_env is None:
            return {}
        key = os.environ.get(self.api_key_env, "").strip()
        if not key:
            raise ValueError(f"JudgeSettings: environment variable {self.api_key_env} is not set")
        if not (key.isascii() and key.isprintable()):
            raise ValueError(
                f"JudgeSettings: environment variable {self.api_key_env} holds characters that "
                "cannot stand in a header"
            )
        return {"Authorization": f"Bearer {key}"}

    def without_key(self, text: str) -> str:
        """`text` with the key masked, should a server have repeated it."""
        key = os.environ.get(self.api_key_env, "").strip() if self.api_key_env else ""
        return text.replace(key, "[key]") if key else text
