"""Requests to an OpenAI-compatible endpoint: bounded, retried, and without the key in sight."""

from __future__ import annotations

import asyncio
import email.utils
import json
import random
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

from latent_rl.rewards.failures import one_line
from latent_rl.rewards.judge.budget import Budget
from latent_rl.rewards.judge.errors import JudgeError
from latent_rl.rewards.judge.settings import JudgeSettings

__all__ = ["ChatClient", "ChatSession"]

MAX_SHOWN = 200
"""Characters of a server's error that a message repeats."""
_RETRIED_STATUS = (408, 409, 429)


@dataclass(frozen=True)
class _Failure:
    """An attempt that failed: why, and how long the server asked to wait, in seconds."""

    kind: str
    message: str
    retried: bool
    wait: float = 0.0


class ChatClient:
    """Opens sessions of requests under the settings' limits.

    sleep, jitter, now: how to wait, a random share in [0, 1], and the time of day in seconds;
    replaced in tests.

    Raises:
        ImportError: httpx2 is not installed.
    """

    def __init__(
        self,
        settings: JudgeSettings,
        budget: Budget,
        *,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
        jitter: Callable[[], float] | None = None,
        now: Callable[[], float] = time.time,
    ) -> None:
        self.settings, self.budget = settings, budget
        self.sleep, self.now = sleep, now
        # Of its own, so that judging leaves the seeds of a run alone.
        self.jitter = jitter or random.Random().random
        _httpx()

    @asynccontextmanager
    async def session(self) -> AsyncIterator[ChatSession]:
        """Connections for one batch; they belong to the running event loop."""
        httpx = _httpx()
        limits = httpx.Limits(max_connections=self.settings.max_concurrency)
        # Redirects are not followed: they would carry key and data to another host.
        async with httpx.AsyncClient(
            limits=limits, timeout=self.settings.timeout, follow_redirects=False
        ) as connections:
            yield ChatSession(self, connections)


class ChatSession:
    """Requests that share connections and the limit of concurrency."""

    def __init__(self, client: ChatClient, connections: Any) -> None:
        self._client, self._connections = client, connections
        self._slots = asyncio.Semaphore(client.settings.max_concurrency)

    async def complete(self, messages: list[dict[str, Any]]) -> str:
        """Return the text of the model's answer.

        A slot is held through the waits between attempts, so that a server which asks for patience
        gets fewer requests.

        Raises:
            JudgeError: after the last attempt.
            RewardStop: the budget is spent and the run is to stop.
        """
        settings = self._client.settings
        attempt = 0
        async with self._slots:
            while True:
                self._client.budget.take_request()
                answer = await self._attempt(messages)
                if isinstance(answer, str):
                    return answer
                attempt += 1
                # What asks for more patience than the whole batch has is given up at once.
                patient = answer.retried and answer.wait <= settings.total_timeout
                if attempt > settings.max_retries or not patient:
                    tries = f" ({attempt} attempts)" if attempt > 1 else ""
                    raise JudgeError(answer.kind, f"judge: {answer.message}{tries}")
                await self._client.sleep(max(answer.wait, self._backoff(attempt)))

    def _backoff(self, attempt: int) -> float:
        settings = self._client.settings
        # The exponent is bounded, so that many retries do not overflow.
        longest = min(settings.max_backoff, settings.backoff * 2.0 ** min(attempt - 1, 60))
        return self._client.jitter() * longest

    async def _attempt(self, messages: list[dict[str, Any]]) -> str | _Failure:
        settings, httpx = self._client.settings, _httpx()
        try:
            # httpx's timeouts are per read: a body that trickles would never end.
            async with asyncio.timeout(settings.timeout):
                status, wait, body = await self._post(messages)
        except (TimeoutError, httpx.TimeoutException):
            return _Failure("timeout", f"no answer within {settings.timeout:g} s", retried=True)
        except _TooLargeError:
            limit = settings.max_response_bytes
            return _Failure("too_large", f"a body of more than {limit} bytes", retried=False)
        except (httpx.HTTPError, httpx.StreamError) as error:
            # The type alone: texts of connection errors may repeat the request.
            return _Failure("connection", type(error).__name__, retried=True)
        if status == 200:
            return self._text_of(body)
        return self._refusal(status, wait, body)

    async def _post(self, messages: list[dict[str, Any]]) -> tuple[int, float, bytes]:
        settings = self._client.settings
        body: dict[str, Any] = {
            **settings.extra_body,
            "model": settings.model,
            "messages": messages,
            "temperature": settings.temperature,
            "max_tokens": settings.max_tokens,
        }
        if settings.json_mode:
            body["response_format"] = {"type": "json_object"}
        request = {"json": body, "headers": settings.headers()}
        async with self._connections.stream("POST", settings.url, **request) as response:
            received = bytearray()
            async for part in response.aiter_bytes():
                received += part
                if len(received) > settings.max_response_bytes:
                    raise _TooLargeError
            wait = self._retry_after(response.headers.get("Retry-After"))
            return response.status_code, wait, bytes(received)

    def _text_of(self, body: bytes) -> str | _Failure:
        try:
            answer = json.loads(body)
            text = answer["choices"][0]["message"]["content"]
            if not isinstance(text, str):
                raise TypeError("content")
        except (ValueError, KeyError, IndexError, TypeError, RecursionError):
            return _Failure("malformed", f"no chat completion: {self._shown(body)}", retried=True)
        self._client.budget.add_usage(answer.get("usage"))
        return text

    def _refusal(self, status: int, wait: float, body: bytes) -> _Failure:
        if status in (401, 403):
            # Such answers like to repeat the key, or parts of it.
            return _Failure("unauthorized", f"HTTP {status}: the key is refused", retried=False)
        kind = "client_error"
        if status == 429:
            kind = "rate_limited"
        elif status >= 500:
            kind = "server_error"
        retried = status in _RETRIED_STATUS or status >= 500
        return _Failure(kind, f"HTTP {status}: {self._shown(body)}", retried, wait)

    def _shown(self, body: bytes) -> str:
        """The beginning of a body, without the key: masked before it is cut, so that no part of it
        stays at the border."""
        said = self._client.settings.without_key(body.decode("utf-8", "replace"))
        return repr(one_line(said[:MAX_SHOWN]))

    def _retry_after(self, header: str | None) -> float:
        """Seconds a Retry-After header asks for; 0 where there is none or it cannot be read."""
        if header is None:
            return 0.0
        try:
            seconds = float(header)
        except ValueError:
            date = email.utils.parsedate_tz(header)
            seconds = 0.0 if date is None else email.utils.mktime_tz(date) - self._client.now()
        return seconds if 0 < seconds < float("inf") else 0.0


class _TooLargeError(Exception):
    """A body above the limit."""


def _httpx() -> Any:
    try:
        import httpx2
    except ImportError as error:
        raise ImportError(
            "the judge needs httpx2: pip install 'latent-rl[judge]' (or httpx2)"
        ) from error
    return httpx2
